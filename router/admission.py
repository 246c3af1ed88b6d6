"""Who waits: a bounded first-in-first-out queue of jobs, retries in front, and the deadlines of all live requests."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from ..core.errors import QueueFull
from .dispatch import Job, LiveRequest

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
SMOOTHING = 0.1  # weight of the newest interval between dispatches


class JobQueue:
    """Jobs in order of dispatch. Three places: ready ones, retries that pause, and stranded ones that no present worker
    could ever serve and that wait for another to come."""

    def __init__(self) -> None:
        self._ready: deque[Job] = deque()
        self._paused: list[tuple[float, int, Job]] = []
        self._stranded: list[Job] = []
        self._sequence = count()
        self._last_dispatch_s: float | None = None
        self._interval_s: float | None = None  # between dispatches while jobs wait

    def __len__(self) -> int:
        return len(self._ready) + len(self._paused) + len(self._stranded)

    def __iter__(self) -> Iterator[Job]:
        yield from self._stranded
        yield from self._ready
        yield from (job for _, _, job in self._paused)

    def check_room(self, limit: int) -> None:
        """Raises QueueFull when a new request has to be refused."""
        if len(self) >= limit:
            raise QueueFull(limit, self.retry_after_s())

    def retry_after_s(self) -> float:
        """When the present backlog will be gone, at the pace of late."""
        expected_s = len(self) * (self._interval_s or 0.0)
        return min(max(expected_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def push(self, job: Job) -> None:
        job.live.jobs.append(job)
        self._ready.append(job)

    def push_front(self, jobs: Sequence[Job], now_s: float) -> None:
        """Retries, the first of them to be dispatched first; those with a later `ready_s` pause until then."""
        for job in reversed(jobs):
            job.live.jobs.append(job)
            if job.ready_s > now_s:
                heappush(self._paused, (job.ready_s, next(self._sequence), job))
            else:
                self._ready.appendleft(job)

    def head(self) -> Job | None:
        return self._ready[0] if self._ready else None

    def pop(self, now_s: float) -> Job:
        """Take the head out for dispatch."""
        job = self._ready.popleft()
        job.live.jobs.remove(job)
        if self._last_dispatch_s is not None and job.queued_s < self._last_dispatch_s:
            interval_s = now_s - self._last_dispatch_s
            old_s = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = old_s + SMOOTHING * (interval_s - old_s)
        self._last_dispatch_s = now_s
        return job

    def remove(self, job: Job) -> None:
        """Its request, or its last choice, has ended."""
        job.live.jobs.remove(job)
        if job in self._ready:
            self._ready.remove(job)
        elif job in self._stranded:
            self._stranded.remove(job)
        else:
            self._paused = [entry for entry in self._paused if entry[2] is not job]
            heapify(self._paused)

    def strand_head(self) -> None:
        self._stranded.append(self._ready.popleft())

    def unstrand(self) -> None:
        """Workers changed: look at the stranded again, in their order."""
        self._ready.extendleft(reversed(self._stranded))
        self._stranded.clear()

    def wake(self, now_s: float) -> None:
        """Put retries whose pause is over in front."""
        while self._paused and self._paused[0][0] <= now_s:
            self._ready.appendleft(heappop(self._paused)[2])

    def next_wake_s(self) -> float | None:
        return self._paused[0][0] if self._paused else None


class Deadlines:
    """The live requests that have one, soonest first. Ended requests leave lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, LiveRequest]] = []
        self._sequence = count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, live: LiveRequest, num_live: int) -> None:
        if live.request.deadline_s is None:
            return
        if len(self._heap) > 2 * num_live + 64:
            self._heap = [entry for entry in self._heap if not entry[2].is_ended]
            heapify(self._heap)
        heappush(self._heap, (live.request.deadline_s, next(self._sequence), live))

    def expired(self, now_s: float) -> Iterable[LiveRequest]:
        """Take out the requests whose deadline has passed while they were live."""
        while self._heap and self._heap[0][0] <= now_s:
            live = heappop(self._heap)[2]
            if not live.is_ended:
                yield live

    def next_s(self) -> float | None:
        while self._heap and self._heap[0][2].is_ended:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
