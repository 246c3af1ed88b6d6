"""The process that renders short conversations: its limits, its turns, and its recovery."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
import pytest

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest, NoWorkerAvailable
from pdserve.gateway.intake import Intake
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.text.chat_template import TooCostly
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.vetting import Fit
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import Unchecked, byte_level, model_info

LIMITS = LimitsSection()
# a conversation costs as its content says
TEMPLATE = (
    "{% set text = messages[0].content %}"
    "{% if text == 'slow' %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif text == 'large' %}{{ 'x' * 10 ** 9 }}"
    "{% elif text == 'endless' %}{{ 10 ** (10 ** 9) }}"
    "{% elif text == 'refused' %}{{ raise_exception('roles that alternate') }}"
    "{% endif %}{{ text }}"
)


def chat(content: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role="user", content=content)])


async def turns() -> None:
    """Lets everything happen that needs no answer of a process."""
    for _ in range(50):
        await asyncio.sleep(0)


def tokenizer() -> Tokenizer:
    data = byte_level().data
    templates = msgspec.structs.replace(data.templates, sources={"default": TEMPLATE})
    return Tokenizer(msgspec.structs.replace(data, templates=templates))


@pytest.fixture
async def offload() -> AsyncIterator[Offload]:
    offload = Offload(tokenizer(), "tiny", 60_000)
    yield offload
    await offload.stop()


async def test_a_conversation_is_rendered_without_the_intake_process(offload: Offload) -> None:
    assert await offload.render(chat("hello"), LIMITS, "a") == "hello"
    assert offload.pid is None


async def test_the_template_refuses_a_conversation_in_its_own_words(offload: Offload) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.chat: .*expected roles that alternate"):
        await offload.render(chat("refused"), LIMITS, "a")


@pytest.mark.parametrize("content", ["slow", "large"])
async def test_a_costly_conversation_ends_without_its_process(offload: Offload, content: str) -> None:
    await offload.render(chat("hello"), LIMITS, "a")
    pid = offload.renderer.pid
    with pytest.raises(TooCostly, match="expected a conversation that the chat template renders in"):
        await offload.render(chat(content), LIMITS, "a")
    assert await offload.render(chat("hello"), LIMITS, "a") == "hello"
    assert offload.renderer.pid == pid


async def test_an_operation_without_end_ends_its_process_alone(offload: Offload) -> None:
    endless = asyncio.create_task(offload.render(chat("endless"), LIMITS, "a"))
    other = asyncio.create_task(offload.render(chat("hello"), LIMITS, "b"))
    with pytest.raises(InvalidRequest, match="expected a conversation that the chat template renders"):
        await endless
    assert await other == "hello"


async def test_a_killed_process_is_replaced_for_the_next_conversation(offload: Offload) -> None:
    await offload.render(chat("hello"), LIMITS, "a")
    assert offload.renderer.pid is not None
    os.kill(offload.renderer.pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(offload.render(chat("hello"), LIMITS, client)) for client in "abc"]
    await turns()
    assert offload.renderer.is_busy
    os.kill(offload.renderer.pid, signal.SIGKILL)
    with pytest.raises(NoWorkerAvailable):
        await tasks[0]
    assert await asyncio.gather(*tasks[1:]) == ["hello", "hello"]


async def test_a_short_conversation_does_not_wait_for_large_bodies(offload: Offload) -> None:
    await offload.decode((70,), True, LIMITS, "a")
    assert offload.pid is not None
    os.kill(offload.pid, signal.SIGSTOP)
    large = asyncio.create_task(offload.encode("x" * 100_000, True, LIMITS, "a", fit=Fit.REQUEST))
    assert await offload.render(chat("hello"), LIMITS, "a") == "hello"
    assert not large.done()
    os.kill(offload.pid, signal.SIGCONT)
    await asyncio.wait([large])


async def test_clients_take_turns_with_their_conversations(offload: Offload) -> None:
    await offload.render(chat("hello"), LIMITS, "a")
    assert offload.renderer.pid is not None
    os.kill(offload.renderer.pid, signal.SIGSTOP)
    done: list[str] = []

    async def ask(client: str, content: str) -> None:
        with suppress(TooCostly):
            await offload.render(chat(content), LIMITS, client)
        done.append(client)

    tasks = [asyncio.create_task(ask("greedy", "slow")) for _ in range(8)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(ask("other", "hello")))
    await turns()
    assert offload.renderer.num_waiting == 8
    os.kill(offload.renderer.pid, signal.SIGCONT)
    await asyncio.gather(*tasks)
    assert done.index("other") <= 2


@pytest.mark.parametrize("content", ["hello", "x" * 5000, "x" * 70_000])
async def test_conversations_of_all_lengths_have_the_tokens_of_their_text(content: str) -> None:
    intake = Intake(tokenizer(), model_info(byte_level()), Unchecked(), Offload(tokenizer(), "tiny", 100_000))
    ids = await intake.token_ids(pb.Prompt(chat=chat(content)), LIMITS, "a", fit=Fit.COUNTED)
    await intake.offload.stop()
    assert ids == byte_level().encode(content, add_special_tokens=False)


async def test_a_costly_conversation_is_refused_after_a_second_try(offload: Offload) -> None:
    """The intake process has more time for it, and then the client learns the reason."""
    intake = Intake(tokenizer(), model_info(byte_level()), Unchecked(), offload)
    with pytest.raises(InvalidRequest, match="renders in 1 s and 256 MiB"):
        await intake.token_ids(pb.Prompt(chat=chat("slow")), LIMITS, "a")
    assert offload.pid is not None
