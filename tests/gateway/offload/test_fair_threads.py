"""The order of jobs on the head's threads, and the fate of jobs whose caller was cancelled."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest, NoWorkerAvailable, QueueFull
from pdserve.gateway.call_bounds import client_of
from pdserve.gateway.intake import Intake
from pdserve.gateway.offload.fair_threads import NUM_THREADS, FairThreads
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import Unchecked, model_info
from tests.gateway.tools.models import eos_of, qwen


class Held:
    """Threads that are all busy until `free`."""

    def __init__(self, threads: FairThreads) -> None:
        self.threads = threads
        self.done: list[str] = []
        self._is_free = threading.Event()
        self._holding: list[asyncio.Task[bool]] = []

    async def hold(self, client: str) -> None:
        self._holding = [
            asyncio.create_task(self.threads.run(client, self._is_free.wait)) for _ in range(NUM_THREADS)
        ]
        await asyncio.sleep(0)  # so that they reach the point where they wait

    async def queue(self, *clients: str) -> "list[asyncio.Task[None]]":
        """Submits a job for each client, which records that client."""
        tasks = [
            asyncio.create_task(self.threads.run(client, self.done.append, client)) for client in clients
        ]
        await asyncio.sleep(0)
        return tasks

    def leave(self) -> None:
        """Cancels the callers of the jobs that hold the threads."""
        for task in self._holding:
            task.cancel()

    def free(self) -> None:
        self._is_free.set()


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    held = Held(FairThreads(max_jobs=32, max_jobs_each=24))
    yield held
    held.free()
    await held.threads.stop()


async def test_a_job_runs_on_a_thread_and_its_exception_is_raised(held: Held) -> None:
    assert await held.threads.run("a", threading.get_ident) != threading.get_ident()
    with pytest.raises(InvalidRequest):
        await held.threads.run("a", failing)


def failing() -> None:
    raise InvalidRequest("prompt", "x", "y")


async def test_another_clients_job_is_next_however_many_one_client_has(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    await held.hold("greedy")
    begun = order_of_beginning(held.threads, monkeypatch)
    tasks = await held.queue(*["greedy"] * 20, "other")
    held.free()
    await asyncio.gather(*tasks)
    assert begun == ["other", *["greedy"] * 20]


def order_of_beginning(threads: FairThreads, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the clients of jobs from now on, in the order in which jobs are submitted to threads: they may
    end in another one."""
    begun, executor = list[str](), threads._executor
    submit = executor.submit

    def submitted(work: Any, *arguments: Any) -> Any:
        begun.append(work.args[-1])
        return submit(work, *arguments)

    monkeypatch.setattr(executor, "submit", submitted)
    return begun


async def test_a_job_whose_caller_was_cancelled_does_not_start(held: Held) -> None:
    await held.hold("a")
    gone, stays = await held.queue("gone", "stays")
    gone.cancel()
    held.free()  # in the same turn: the job is still in the queue
    await stays
    await asyncio.wait([gone])
    assert held.done == ["stays"] and held.threads.num_waiting == 0


async def test_a_running_job_keeps_its_thread_when_its_caller_is_cancelled(held: Held) -> None:
    await held.hold("a")
    (waits,) = await held.queue("b")
    held.leave()
    await asyncio.sleep(0)
    assert held.threads.num_waiting == 1
    held.free()
    await waits
    assert held.done == ["b"]


async def test_one_client_cannot_take_all_places(held: Held) -> None:
    await held.hold("greedy")
    tasks = await held.queue(*["greedy"] * 25, "other")
    with pytest.raises(QueueFull) as refused:
        await tasks[24]
    assert refused.value.limit == 24
    held.free()
    await asyncio.gather(*tasks[:24], tasks[25])
    assert held.done.count("other") == 1


async def test_waiting_and_later_callers_are_refused_when_the_server_ends(held: Held) -> None:
    await held.hold("a")
    (waits,) = await held.queue("b")
    stopping = asyncio.create_task(held.threads.stop())
    with pytest.raises(NoWorkerAvailable):
        await waits
    with pytest.raises(NoWorkerAvailable):
        await held.threads.run("c", threading.get_ident)
    held.free()
    await stopping


LONG_TOOL = pb.Tool(name="f", description="d" * 5000, parameters="{}")
HELLO = [pb.ChatMessage(role="user", content="hello")]
LONG = [pb.ChatMessage(role="user", content="hello " * 1000)]
PROMPTS: dict[str, tuple[pb.Prompt, list[str]]] = {
    "text": (pb.Prompt(text="the dog " * 1000), ["bounded_ids"]),
    "conversation": (pb.Prompt(chat=pb.Chat(messages=LONG)), ["bounded_ids"]),
    "tools": (
        pb.Prompt(chat=pb.Chat(messages=HELLO, tools=[LONG_TOOL])),
        ["OfferedTools.read", "bounded_ids", "tool_grammar"],
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
async def test_all_thread_work_for_a_prompt_counts_for_its_client(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, expected = PROMPTS[kind]
    info = replace(model_info(qwen()), max_model_len=60_000, eos_token_ids=(eos_of(qwen()),))
    intake = Intake(qwen(), info, Unchecked())
    threads, done = intake.offload.threads, list[tuple[str, str]]()
    run = threads.run

    async def noted(client: str, function: Callable[..., Any], *arguments: Any) -> Any:
        done.append((client, function.__qualname__))
        return await run(client, function, *arguments)

    async def rendered(*_: object) -> str:
        return LONG[0].content

    monkeypatch.setattr(threads, "run", noted)
    monkeypatch.setattr(intake.offload, "render", rendered)  # in its own process
    monkeypatch.setattr(asyncio, "to_thread", None)
    message = pb.GenerateRequest(model=info.name, prompt=prompt)
    await intake.request(message, LimitsSection(), None, "ipv4:10.0.0.1:4567")
    monkeypatch.undo()
    await intake.offload.stop()
    assert done == [(client_of(None, "10.0.0.1"), name) for name in expected]
