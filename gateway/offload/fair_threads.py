"""Threads for work that takes the head some milliseconds: prompts of medium length, conversations, tool
grammars, long answers.

Clients take turns, as with the intake process: asyncio's own threads would run all jobs in order of arrival,
and so a client's thousand prompts before any other client's one."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from ...core.errors import NoWorkerAvailable
from .job_queue import IntakeQueue

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 2  # they share one GIL: more would only slow each of them down
MAX_JOBS = 2048
MAX_JOBS_EACH = 1024  # so that a burst that fits into the router's queue is not refused here


@dataclass(eq=False)
class _Job:
    """One job, and the future that its caller awaits."""

    client: str
    work: Callable[[], Any]
    result: "asyncio.Future[Any]"


class FairThreads:
    """Used on one asyncio loop."""

    def __init__(self, max_jobs: int = MAX_JOBS, max_jobs_each: int = MAX_JOBS_EACH) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="intake")
        self._queue: IntakeQueue[_Job] = IntakeQueue(max_jobs, max_jobs_each)
        self._running: Counter[str] = Counter()  # jobs on threads, by client; none is 0
        self._is_stopped = False

    @property
    def num_waiting(self) -> int:
        """The number of jobs that are not on a thread yet."""
        return len(self._queue)

    async def run(self, client: str, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Returns the function's result, computed on a thread. Raises the function's exceptions; QueueFull,
        or NoWorkerAvailable after `stop`.

        A job whose caller is cancelled does not start. A running one continues, and keeps its thread until it
        ends."""
        if self._is_stopped:
            raise NoWorkerAvailable("the server ends")
        work = partial(copy_context().run, function, *arguments, **named)
        job = _Job(client, work, asyncio.get_running_loop().create_future())
        self._queue.push(client, job)
        self._begin()
        try:
            result: T = await job.result
            return result
        finally:
            self._queue.remove(client, job)

    async def stop(self) -> None:
        """Ends the threads; idempotent. Waiting jobs are refused, running ones are completed."""
        self._is_stopped = True
        for _ in range(len(self._queue)):
            job = self._queue.pop()
            if not job.result.done():
                job.result.set_exception(NoWorkerAvailable("the server ends"))
        await asyncio.to_thread(self._executor.shutdown)

    def _begin(self) -> None:
        """Starts jobs on all free threads."""
        while len(self._queue) and self._running.total() < NUM_THREADS:
            job = self._queue.pop(after_others=self._running)
            if not job.result.done():  # its caller still waits
                self._running[job.client] += 1
                running = asyncio.get_running_loop().run_in_executor(self._executor, job.work)
                running.add_done_callback(partial(self._end, job))

    def _end(self, job: _Job, ended: "asyncio.Future[Any]") -> None:
        self._running[job.client] -= 1
        if not self._running[job.client]:
            del self._running[job.client]
        error = ended.exception()
        if not job.result.done():
            if error is not None:
                job.result.set_exception(error)
            else:
                job.result.set_result(ended.result())
        self._begin()
