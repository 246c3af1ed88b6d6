"""Who waits: a bounded queue of jobs, retries in front, clients in turns; and the deadlines of all live requests."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from ..core.errors import QueueFull
from .dispatch import Job, LiveRequest
from .fair_queue import FairQueue

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
SMOOTHING = 0.1  # weight of the newest interval between dispatches
NEWCOMERS = 8  # one place in so many is kept for clients that have nothing queued


class JobQueue:
    """Jobs in order of dispatch: first what was dispatched before, then clients in turns. Beside them retries that pause,
    stranded jobs that no present worker could ever serve and that wait for another to come, and parked ones whose client
    does not read."""

    def __init__(self) -> None:
        self._front: deque[Job] = deque()
        self._fair: FairQueue[Job] = FairQueue()
        self._paused: list[tuple[float, int, Job]] = []
        self._stranded: list[Job] = []
        self._parked: list[Job] = []
        self._sequence = count()
        self._last_dispatch_s: float | None = None
        self._interval_s: float | None = None  # between dispatches while jobs wait

    def __len__(self) -> int:
        """Jobs that wait for workers; parked ones wait for their clients."""
        return len(self._front) + len(self._fair) + len(self._paused) + len(self._stranded)

    def __iter__(self) -> Iterator[Job]:
        yield from self._stranded
        yield from self._front
        yield from self._fair
        yield from (job for _, _, job in self._paused)
        yield from self._parked

    def check_room(self, client: str, limit: int, now_s: float, job_s: float) -> None:
        """Raises QueueFull when a new request has to be refused. No client, nor all that wait, can fill the places that
        are kept for newcomers. `job_s`: seconds between dispatches by prediction, for as long as none was measured."""
        if self._fair.num_queued(client):
            limit -= limit // NEWCOMERS
        if len(self) >= limit:
            raise QueueFull(limit, self.retry_after_s(now_s, job_s))

    def retry_after_s(self, now_s: float, job_s: float) -> float:
        """When the present backlog will be gone, at the pace of late."""
        expected_s = len(self) * self._pace_s(now_s, job_s)
        return min(max(expected_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def _pace_s(self, now_s: float, job_s: float) -> float:
        """Seconds between dispatches. When none has come for longer than that, as if one came now."""
        pace_s = job_s if self._interval_s is None else self._interval_s
        if self._last_dispatch_s is None:
            return pace_s
        return max(pace_s, pace_s + SMOOTHING * (now_s - self._last_dispatch_s - pace_s))

    def push(self, job: Job) -> None:
        job.live.jobs.append(job)
        self._fair.push(job.client, job, job.num_tokens)

    def push_front(self, jobs: Sequence[Job], now_s: float) -> None:
        """Retries, the first of them to be dispatched first; those with a later `ready_s` pause until then."""
        for job in reversed(jobs):
            job.live.jobs.append(job)
            if job.ready_s > now_s:
                heappush(self._paused, (job.ready_s, next(self._sequence), job))
            else:
                self._front.appendleft(job)

    def push_back(self, jobs: Sequence[Job]) -> None:
        """They gave up their places to another client: they wait for their client's turn, before what it has queued."""
        for job in reversed(jobs):
            job.live.jobs.append(job)
            self._fair.push(job.client, job, job.num_tokens, is_first=True)

    def favour(self, job: Job) -> None:
        """A waiting job passes all others."""
        self._take_out(job)
        self._front.appendleft(job)

    def candidates(self) -> Iterator[Job]:
        """At least the first job of each client that could be dispatched now."""
        yield from self._front
        yield from self._fair.firsts()

    def head(self) -> Job | None:
        return self._front[0] if self._front else self._fair.head()

    def pop(self, now_s: float, cost: int) -> Job:
        """Take the head out for dispatch. Its client is charged `cost` tokens, but not for a retry."""
        job = self.head()
        assert job is not None
        job.live.jobs.remove(job)
        if self._front:
            self._front.popleft()
        else:
            self._fair.pop(job.client, job, cost)
        if self._last_dispatch_s is not None and job.queued_s < self._last_dispatch_s:
            interval_s = now_s - self._last_dispatch_s
            old_s = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = old_s + SMOOTHING * (interval_s - old_s)
        self._last_dispatch_s = now_s
        return job

    def remove(self, job: Job) -> None:
        """Its request, or its last choice, has ended."""
        job.live.jobs.remove(job)
        self._take_out(job)

    def _take_out(self, job: Job) -> None:
        if self._fair.remove(job.client, job):
            return
        for place in (self._front, self._stranded, self._parked):
            if job in place:
                place.remove(job)
                return
        self._paused = [entry for entry in self._paused if entry[2] is not job]
        heapify(self._paused)

    def strand_head(self) -> None:
        job = self.head()
        assert job is not None
        self._take_out(job)
        self._stranded.append(job)

    def unstrand(self) -> None:
        """Workers changed: look at the stranded again, in their order."""
        self._front.extendleft(reversed(self._stranded))
        self._stranded.clear()

    def park(self, jobs: Sequence[Job]) -> None:
        """Their client does not read: they wait until `unpark`."""
        for job in jobs:
            if job in job.live.jobs:
                self._take_out(job)
            else:
                job.live.jobs.append(job)
            self._parked.append(job)

    def unpark(self, live: LiveRequest) -> None:
        """The client reads again: its jobs are in front, as they were dispatched before."""
        jobs = [job for job in self._parked if job.live is live]
        self._parked = [job for job in self._parked if job.live is not live]
        self._front.extendleft(reversed(jobs))

    def wake(self, now_s: float) -> None:
        """Put retries whose pause is over in front."""
        while self._paused and self._paused[0][0] <= now_s:
            self._front.appendleft(heappop(self._paused)[2])

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
