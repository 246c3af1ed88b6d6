"""Gives the intake process one job after the other."""

import asyncio
import itertools
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from ...core.codec import FrameDecoder, FrameEncoder
from ...core.errors import InvalidRequest, NoWorkerAvailable, Problem
from ...core.limited_child import READ_BYTES, Death, LimitedChild
from ..text.chat_template import TooCostly
from ..translate import UnknownModel
from .job_queue import MAX_JOBS, MAX_JOBS_EACH, IntakeQueue
from .messages import (
    DataPart,
    Done,
    EncodeChat,
    FromProcess,
    IntakeJob,
    IntakeSetup,
    JobRefused,
    RenderChat,
    TemplateSetup,
    parts,
)

Setup = IntakeSetup | TemplateSetup

# a process without an answer for this long is stopped or starved: its jobs end after 10 s of work
SILENT_S = 60.0


@dataclass(eq=False)
class _PendingJob:
    """One job, and the future that its caller awaits."""

    job: IntakeJob
    data: bytes
    result: "asyncio.Future[tuple[list[bytes], bytes]]"

    def excess(self) -> InvalidRequest:
        """The refusal of a job that was ended by the process's limits."""
        if isinstance(self.job.work, EncodeChat | RenderChat):
            expected = "a conversation that the chat template renders with the time and memory that one has"
            return InvalidRequest("prompt.chat", f"{len(self.data)} bytes", expected)
        expected = "what can be read with the time and memory that one request has"
        return InvalidRequest("message", f"{len(self.data)} bytes", expected)


class IntakeProcess(LimitedChild[tuple[Setup, bytes]]):
    """Used on one asyncio loop. `need` starts the process ahead of the first job, so that this one does not
    wait for it."""

    def __init__(
        self,
        set_up: Callable[[], tuple[Setup, bytes]],
        max_jobs: int = MAX_JOBS,
        max_jobs_each: int = MAX_JOBS_EACH,
    ) -> None:
        """`set_up` runs later, on a thread; it may take a moment."""
        super().__init__("intake", set_up, f"{__package__}.main")
        self._queue: IntakeQueue[_PendingJob] = IntakeQueue(max_jobs, max_jobs_each)
        self._current: _PendingJob | None = None  # the process has it
        self._is_ready = False  # the current process

    @property
    def num_waiting(self) -> int:
        """The number of jobs that the process does not have yet."""
        return len(self._queue)

    @property
    def is_busy(self) -> bool:
        """Whether the process has a job."""
        return self._current is not None

    async def do(self, job: IntakeJob, data: bytes, client: str) -> tuple[list[bytes], bytes]:
        """Returns the results and their metadata.

        Raises the work's exceptions; InvalidRequest if it takes too much, QueueFull if many jobs wait,
        NoWorkerAvailable if there is no process."""
        if self._is_stopped:
            raise NoWorkerAvailable("the server ends")
        pending = _PendingJob(job, data, asyncio.get_running_loop().create_future())
        self._queue.push(client, pending)
        self.need()
        try:
            return await pending.result
        finally:
            self._queue.remove(client, pending)

    async def stop(self) -> None:
        """Ends the process; idempotent. Waiting jobs are refused."""
        await super().stop()
        self._give_up("the server ends")

    def _on_death(self, death: Death) -> bool:
        is_ready, self._is_ready = self._is_ready, False
        victim, self._current = self._current, None
        if victim is not None and not victim.result.done():
            if death is Death.OTHER:
                victim.result.set_exception(NoWorkerAvailable("the intake process died over it"))
            else:
                victim.result.set_exception(victim.excess())
        if not is_ready:
            self._give_up("the intake process does not start")
        return not is_ready

    def _has_jobs(self) -> bool:
        return bool(self._queue)

    def _give_up(self, why: str) -> None:
        waiting = [self._queue.pop() for _ in range(len(self._queue))]
        if self._current is not None:
            waiting.append(self._current)
        for pending in waiting:
            if not pending.result.done():
                pending.result.set_exception(NoWorkerAvailable(why))

    async def _converse(
        self, process: Process, ended: "asyncio.Future[int]", setup: tuple[Setup, bytes]
    ) -> None:
        encoder = FrameEncoder()
        async with aclosing(_answers(process)) as answers:
            async with asyncio.timeout(SILENT_S):
                await _send(process, encoder, *setup)
                await anext(answers)
            self._is_ready = True
            while True:
                self._current = await self._next_job(ended)
                async with asyncio.timeout(SILENT_S):
                    await _send(process, encoder, self._current.job, self._current.data)
                    answer = await anext(answers)
                    results = (
                        [await _result(answers, size) for size in answer.sizes]
                        if isinstance(answer, Done)
                        else []
                    )
                self._settle(self._current, answer, results)
                self._current = None

    async def _next_job(self, ended: "asyncio.Future[int]") -> _PendingJob:
        """Waits for a job. Raises EOFError if the process ends meanwhile."""
        while True:
            self._needed.clear()
            while len(self._queue):
                pending = self._queue.pop()
                if not pending.result.done():  # its caller still waits
                    return pending
            await self._need_or_end(ended)

    async def _need_or_end(self, ended: "asyncio.Future[int]") -> None:
        """Raises EOFError when the process has ended."""
        needed = asyncio.ensure_future(self._needed.wait())
        try:
            await asyncio.wait((needed, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise EOFError
        finally:
            needed.cancel()
            await asyncio.wait((needed,))

    def _settle(self, pending: _PendingJob, answer: FromProcess, results: list[bytes]) -> None:
        if pending.result.done():  # its client has disconnected
            return
        match answer:
            case Done(rest=rest):
                pending.result.set_result((results, rest))
            case JobRefused(unknown_model=None):
                kind = TooCostly if answer.is_too_costly else InvalidRequest
                problems = [Problem(*problem) for problem in answer.problems]
                pending.result.set_exception(kind.of(problems, answer.reason))
            case JobRefused(unknown_model=(name, served)):
                pending.result.set_exception(UnknownModel(name, served))
            case _:
                raise ValueError("a part of nothing")


async def _send(process: Process, encoder: FrameEncoder, message: Setup | IntakeJob, data: bytes) -> None:
    assert process.stdin is not None
    for frame in itertools.chain([message], parts(data)):
        process.stdin.write(encoder.encode(frame))
        await process.stdin.drain()


async def _answers(process: Process) -> AsyncGenerator[FromProcess, None]:
    """Raises EOFError when the process has ended."""
    assert process.stdout is not None
    decoder: FrameDecoder[FromProcess] = FrameDecoder(FromProcess)
    while data := await process.stdout.read(READ_BYTES):
        for answer in decoder.feed(data):
            yield answer
    raise EOFError


async def _result(answers: AsyncIterator[FromProcess], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await anext(answers)
        assert isinstance(part, DataPart), "not the next part"
        data += part.data
    return bytes(data)
