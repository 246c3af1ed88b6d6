"""The real intake process: its answers, and the fate of jobs when it dies."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pdserve.core import limited_child
from pdserve.core.codec import FrameEncoder
from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest, NoWorkerAvailable
from pdserve.gateway.offload import main, process as shell
from pdserve.gateway.offload.messages import Decode, Encode, IntakeJob, IntakeSetup, parts
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.offload.process import IntakeProcess
from pdserve.gateway.offload.work import IntakeWorker, packed
from pdserve.gateway.text.encoding import bounded_ids
from pdserve.gateway.vetting import Fit
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import byte_level
from tests.processes import await_end

LIMITS = LimitsSection()
CONTEXT = 131_072


in_one_process = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def offload() -> AsyncIterator[Offload]:
    """Shared by tests that leave it as it is."""
    offload = Offload(byte_level(), "tiny", CONTEXT)
    yield offload
    await offload.stop()


async def test_it_starts_with_the_first_job_or_on_request() -> None:
    offload = Offload(byte_level(), "tiny", CONTEXT)
    assert offload.pid is None
    assert await offload.decode((70, 71), True, LIMITS, "a") == byte_level().decode((70, 71))
    assert offload.pid is not None
    await offload.stop()


@in_one_process
@pytest.mark.parametrize(
    "text", ["x", "the quick brown fox " * 20_000, "你好🙂" * 30_000, "<|im_start|> <tool>\n" * 9]
)
async def test_a_text_has_the_same_tokens_wherever_it_is_encoded(offload: Offload, text: str) -> None:
    assert await offload.encode(text, True, LIMITS, "a", fit=Fit.COUNTED) == byte_level().encode(text)


@in_one_process
async def test_a_conversation_has_the_same_tokens_wherever_it_is_rendered(offload: Offload) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello " * 20_000)])
    text = byte_level().templates.render([{"role": "user", "content": "hello " * 20_000}])
    ids = await offload.encode_chat(chat, LIMITS, "a", fit=Fit.REQUEST)
    assert ids == byte_level().encode(text, add_special_tokens=False)


@in_one_process
async def test_many_tokens_have_the_same_text_wherever_they_are_decoded(offload: Offload) -> None:
    ids = tuple(range(2, 390)) * 300
    assert await offload.decode(ids, True, LIMITS, "a") == byte_level().decode(ids, skip_special_tokens=True)


@in_one_process
@pytest.mark.parametrize("text", ["a" * 16_000_000, "<tool>" * 400_000, "你" * 500_000])
async def test_a_prompt_of_far_too_many_tokens_is_refused(offload: Offload, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await offload.encode(text, True, LIMITS, "a", fit=Fit.REQUEST)
    assert refused.value.field == "prompt" and "at most" in refused.value.expected


@in_one_process
async def test_refusals_are_the_same_as_in_the_head(offload: Offload) -> None:
    text = "the quick brown fox " * 20_000
    small = Offload(byte_level(), "tiny", 300)
    try:
        with pytest.raises(InvalidRequest) as here:
            bounded_ids(byte_level(), text, True, small.bounds(LIMITS))
        with pytest.raises(InvalidRequest) as there:
            await small.encode(text, True, LIMITS, "a", fit=Fit.REQUEST)
    finally:
        await small.stop()
    assert (str(here.value), here.value.field, here.value.expected) == (
        str(there.value),
        there.value.field,
        there.value.expected,
    )


class Killable:
    """The process, occupied by a job that never ends."""

    def __init__(self, process: IntakeProcess) -> None:
        self.process = process

    async def ask(self, client: str, token_id: int = 70) -> str:
        (text,), _ = await self.process.do(_job(), packed([token_id]), client)
        return text.decode()


def _job() -> IntakeJob:
    return IntakeJob(Decode(True), LIMITS.model_dump_json().encode(), 4)


def set_up() -> tuple[IntakeSetup, bytes]:
    tokenizer = msgspec.msgpack.encode(byte_level().data)
    return IntakeSetup(len(tokenizer), "tiny", CONTEXT), tokenizer


@pytest.fixture
async def killable() -> AsyncIterator[Killable]:
    process = IntakeProcess(set_up)
    yield Killable(process)
    await process.stop()


async def stopped_at_work(killable: Killable) -> "asyncio.Task[str]":
    """Submits a job to a process that is stopped."""
    await killable.ask("first")
    assert killable.process.pid is not None
    os.kill(killable.process.pid, signal.SIGSTOP)
    task = asyncio.create_task(killable.ask("victim"))
    for _ in range(50):  # turns of the loop; no external answer is needed
        await asyncio.sleep(0)
    assert killable.process.is_busy and not killable.process.num_waiting
    return task


@pytest.mark.parametrize("cause", [signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV])
async def test_an_excessive_job_is_refused_and_the_others_continue(
    killable: Killable, cause: signal.Signals
) -> None:
    victim = await stopped_at_work(killable)
    others = [asyncio.create_task(killable.ask(client)) for client in ("a", "b", "a")]
    await asyncio.sleep(0)
    assert killable.process.pid is not None
    os.kill(killable.process.pid, cause)
    os.kill(killable.process.pid, signal.SIGCONT)
    with pytest.raises(InvalidRequest) as refused:
        await victim
    assert "time and memory" in refused.value.expected
    assert await asyncio.gather(*others) == [byte_level().decode([70])] * 3


async def test_a_process_killed_from_outside_is_replaced_without_blame(killable: Killable) -> None:
    victim = await stopped_at_work(killable)
    other = asyncio.create_task(killable.ask("other"))
    assert killable.process.pid is not None
    os.kill(killable.process.pid, signal.SIGKILL)
    with pytest.raises(NoWorkerAvailable):
        await victim
    assert await other == byte_level().decode([70])


async def test_a_disconnecting_client_frees_its_place(killable: Killable) -> None:
    victim = await stopped_at_work(killable)
    gone = asyncio.create_task(killable.ask("gone"))
    await asyncio.sleep(0)
    assert killable.process.num_waiting == 1
    gone.cancel()
    await asyncio.wait([gone])
    assert killable.process.num_waiting == 0
    assert killable.process.pid is not None
    os.kill(killable.process.pid, signal.SIGCONT)
    assert await victim


async def test_waiting_callers_are_refused_when_the_server_ends(killable: Killable) -> None:
    victim = await stopped_at_work(killable)
    other = asyncio.create_task(killable.ask("other"))
    await asyncio.sleep(0)
    await killable.process.stop()
    for task in (victim, other):
        with pytest.raises(NoWorkerAvailable):
            await task


async def test_a_process_that_is_silent_is_killed(
    killable: Killable, monkeypatch: pytest.MonkeyPatch
) -> None:
    await killable.ask("first")
    monkeypatch.setattr(shell, "SILENT_S", 0.05)
    with pytest.raises(NoWorkerAvailable):
        await (await stopped_at_work(killable))
    monkeypatch.undo()
    assert await killable.ask("first") == byte_level().decode([70])


async def test_waiting_callers_are_informed_that_the_process_cannot_start() -> None:
    def broken() -> tuple[IntakeSetup, bytes]:
        return IntakeSetup(4, "tiny", CONTEXT), b"none"

    process = IntakeProcess(broken)
    with pytest.raises(NoWorkerAvailable) as refused:
        await process.do(_job(), packed([1]), "a")
    assert "does not start" in str(refused.value)
    await process.stop()


async def test_a_failed_start_is_retried_only_for_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    num_starts = 0

    async def fails(*_: object, **__: object) -> None:
        nonlocal num_starts
        num_starts += 1
        raise OSError("no memory")

    monkeypatch.setattr(limited_child, "START_AGAIN_S", 0)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", fails)
    process = IntakeProcess(set_up)
    for expected in (1, 2):
        with pytest.raises(NoWorkerAvailable):
            await process.do(_job(), packed([1]), "a")
        for _ in range(50):  # turns of the loop; a start takes a few of them
            await asyncio.sleep(0)
        assert num_starts == expected
    await process.stop()


async def test_its_end_is_awaited_once_for_any_number_of_jobs(
    killable: Killable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio keeps each of these waits until the process ends, also cancelled ones."""
    num_waits, wait = 0, asyncio.subprocess.Process.wait

    async def counted(process: asyncio.subprocess.Process) -> int:
        nonlocal num_waits
        num_waits += 1
        return await wait(process)

    monkeypatch.setattr(asyncio.subprocess.Process, "wait", counted)
    for _ in range(10):
        await killable.ask("a")
    assert num_waits == 1


async def test_a_job_after_the_end_is_refused(killable: Killable) -> None:
    await killable.ask("first")
    await killable.process.stop()
    with pytest.raises(NoWorkerAvailable) as refused:
        await killable.ask("late")
    assert "the server ends" in str(refused.value)


async def test_it_is_gone_when_it_was_stopped(killable: Killable) -> None:
    await killable.ask("first")
    pid = killable.process.pid
    assert pid is not None
    await killable.process.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_it_ends_with_its_owner() -> None:
    """Holds also if the owner had no time to stop it."""
    owner = (
        "import asyncio, os\n"
        "from tests.gateway.offload.test_process import Killable, set_up\n"
        "from pdserve.gateway.offload.process import IntakeProcess\n"
        "async def main():\n"
        "    process = IntakeProcess(set_up)\n"
        "    await Killable(process).ask('a')\n"
        "    print(process.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", owner, stdout=asyncio.subprocess.PIPE)
    printed, _ = await child.communicate()
    await asyncio.to_thread(await_end, int(printed))


@pytest.mark.parametrize(("resource", "exit_code"), [("time", -signal.SIGPROF), ("memory", -signal.SIGABRT)])
async def test_an_endless_job_ends_the_process(resource: str, exit_code: int) -> None:
    """Relies on the process's own limits, which are reduced here."""
    work = {"time": "while True: pass", "memory": "bytearray(1 << 30)"}[resource]
    script = (
        "from pdserve.gateway.offload import main\n"
        "main.JOB_S, main.MEMORY_BYTES = 0.2, 1 << 28\n"
        "def do(self, job, data):\n"
        f"    {work}\n"
        "main.IntakeWorker.do = do\n"
        "main.main()\n"
    )
    setup, tokenizer = set_up()
    encoder = FrameEncoder()
    frames = [setup, *parts(tokenizer), _job(), *parts(packed([1]))]
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE)
    await child.communicate(b"".join(map(encoder.encode, frames)))
    assert (
        child.returncode == exit_code and limited_child.Death.of(exit_code) is not limited_child.Death.OTHER
    )


def test_the_worker_needs_no_transformers() -> None:
    """Its import would take seconds."""
    script = (
        "import sys, pdserve.gateway.offload.main; print('transformers' in sys.modules, 'torch' in"
        " sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    assert printed.stdout.split() == ["False", "False"]
    assert main.JOB_S < shell.SILENT_S


def test_a_worker_accepts_a_tokenizers_own_data() -> None:
    worker = IntakeWorker(*set_up())
    (ids,), _ = worker.do(
        IntakeJob(Encode(True, Fit.REQUEST), LIMITS.model_dump_json().encode(), 0), "<tool> Köln".encode()
    )
    assert ids == packed(byte_level().encode("<tool> Köln"))
