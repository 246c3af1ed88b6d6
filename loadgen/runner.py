"""Sends a load and records what comes back. An open load's requests are sent when they are due, whether or
not earlier ones have been answered; a closed one has a number of clients, each with one request at a time."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from .errors import LoadRequestFailed
from .records import CompletedRequest, GeneratorLoad, RequestRecord, Round, TokenChunk
from .target import LoadRequest, Target
from .workload import ScheduledRequest

_LAG_INTERVAL_S = 0.05

MakeRequest = Callable[[ScheduledRequest], LoadRequest]


class Clock(Protocol):
    """The time, and waiting for it."""

    def now_s(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None: ...


class RealClock:
    def now_s(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s()))


@dataclass(frozen=True)
class RoundLoad:
    """The load of one round: jobs with send times, or `concurrency` clients that share them."""

    jobs: Iterator[ScheduledRequest]
    make_request: MakeRequest
    concurrency: int | None = None  # None: an open loop
    duration_s: float | None = None  # for a closed loop: after it nothing new is sent
    timeout_s: float | None = None  # limit per request


class LoadRunner:
    """One target under load."""

    def __init__(self, target: Target, clock: Clock | None = None) -> None:
        self._target = target
        self._clock = clock or RealClock()

    async def run(self, load: RoundLoad) -> tuple[RequestRecord, ...]:
        """Runs until every request has ended; returns records in the order of sending."""
        records: list[RequestRecord] = []
        send = self._open_loop if load.concurrency is None else self._closed_loop
        await send(load, records)
        return tuple(sorted(records, key=lambda record: record.sent_s))

    async def measured(self, load: RoundLoad) -> Round:
        """Like `run`, with the generator's own load."""
        lags_s: list[float] = []
        cpu_s, start_s = time.process_time(), time.perf_counter()
        async with _lags_watched(self._clock, lags_s):
            records = await self.run(load)
        generator = GeneratorLoad(time.process_time() - cpu_s, time.perf_counter() - start_s, tuple(lags_s))
        return Round(records, generator)

    async def warm_up(self, requests: list[LoadRequest], timeout_s: float | None = None) -> None:
        """Sends requests one after the other, and records none. Raises LoadRequestFailed when one fails."""
        for request in requests:
            async with asyncio.timeout(timeout_s):
                await self._target.send(request, lambda num_tokens: None)

    async def _open_loop(self, load: RoundLoad, records: list[RequestRecord]) -> None:
        start_s = self._clock.now_s()
        async with asyncio.TaskGroup() as tasks:
            for job in load.jobs:
                assert job.due_s is not None
                request, due_s = load.make_request(job), start_s + job.due_s
                await self._clock.sleep_until(due_s)
                tasks.create_task(self._record(job, request, due_s, load.timeout_s, records))
                await asyncio.sleep(0)  # it is sent before the next one's prompt is made

    async def _closed_loop(self, load: RoundLoad, records: list[RequestRecord]) -> None:
        assert load.concurrency is not None
        end_s = None if load.duration_s is None else self._clock.now_s() + load.duration_s

        async def client() -> None:
            for job in load.jobs:
                if end_s is not None and self._clock.now_s() >= end_s:
                    return
                await self._record(job, load.make_request(job), None, load.timeout_s, records)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(load.concurrency):
                tasks.create_task(client())

    async def _record(
        self,
        job: ScheduledRequest,
        request: LoadRequest,
        due_s: float | None,
        timeout_s: float | None,
        records: list[RequestRecord],
    ) -> None:
        now_s, chunks = self._clock.now_s, list[TokenChunk]()
        answer: CompletedRequest | None = None
        error, message, sent_s = None, "", now_s()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._target.send(
                    request, lambda num_tokens: chunks.append(TokenChunk(now_s(), num_tokens))
                )
        except LoadRequestFailed as failure:
            error, message = failure.kind, failure.message
        except TimeoutError:
            error = "timeout"
        records.append(
            RequestRecord(
                index=job.index,
                due_s=due_s,
                sent_s=sent_s,
                ended_s=now_s(),
                num_prompt_tokens=len(request.token_ids),
                chunks=tuple(chunks),
                answer=answer,
                error=error,
                message=message,
            )
        )


@asynccontextmanager
async def _lags_watched(clock: Clock, lags_s: list[float]) -> AsyncIterator[None]:
    """A timer over and over, and by how much each came late."""

    async def watch() -> None:
        while True:
            due_s = clock.now_s() + _LAG_INTERVAL_S
            await clock.sleep_until(due_s)
            lags_s.append(max(0.0, clock.now_s() - due_s))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
