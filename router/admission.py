"""Admission: a bounded queue of jobs, retries first, then clients in turns; and the deadlines of all live
requests."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from heapq import heapify, heappop, heappush
from itertools import count

from ..core.errors import QueueFull
from .fair_queue import PriorityQueue, TokenCounters
from .front_jobs import FrontJobs
from .live_request import Job, LiveRequest
from .passed_jobs import PassedJobs
from .timetable import Timetable

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
SMOOTHING = 0.1  # weight of the newest interval between dispatches
NEWCOMERS = 8  # one in this many places is kept for clients that have nothing queued


class JobQueue:
    """Jobs in order of dispatch: by priority, those dispatched before first, then clients in turns. Retries
    that back off are held separately, as are stranded jobs, which no present worker could ever serve and
    which wait for another to join, and large jobs without room, which others pass. A job is put in, and taken
    out from wherever it waits, in logarithmic time."""

    def __init__(self, may_run: Callable[[Job], bool] = lambda job: True) -> None:
        """`may_run`: whether a job's client may have it running now."""
        self.may_run = may_run
        self.counters = TokenCounters()
        self.num_added = 0  # times that jobs were put among those that can be placed
        self._passed = PassedJobs(self.counters)
        self._front = FrontJobs()
        self._fair: PriorityQueue[Job] = PriorityQueue(
            self.counters,
            may_run,
            user_of=lambda job: job.live.request.turn,
            least_elsewhere=self._passed.least_had,
        )
        # ordered sets
        self._returning: dict[Job, None] = {}  # in front at the next `wake`, in this order
        self._stranded: dict[Job, None] = {}
        self._suspects: dict[Job, None] = {}  # run alone, apart from all others
        self._held: dict[Job, None] = {}  # until it is known whether a worker died of them
        self._backing_off: Timetable[Job] = Timetable()
        # stranded jobs, and suspects: the one that waits longest is first
        self._awaiting: deque[Job] = deque()
        self._last_dispatch_s: float | None = None
        self._interval_s: float | None = None  # mean time between dispatches while jobs wait

    def __len__(self) -> int:
        in_front = len(self._stranded) + len(self._returning) + len(self._passed) + len(self._front)
        in_front += len(self._held)
        return in_front + len(self._fair) + len(self._backing_off) + len(self._suspects)

    def __iter__(self) -> Iterator[Job]:
        yield from self._stranded
        yield from self._returning
        yield from self._passed
        yield from self._front
        yield from self._fair
        yield from self._suspects
        yield from self._held
        yield from self._backing_off

    def check_room(self, client: str, limit: int, now_s: float, job_s: float) -> None:
        """Raises QueueFull when a new request has to be refused. Neither one client nor all waiting clients
        can fill the places kept for newcomers. `job_s` is the predicted time between dispatches, used until
        one has been measured."""
        if self._fair.num_queued(client):
            limit -= limit // NEWCOMERS
        if len(self) >= limit:
            raise QueueFull(limit, self.retry_after_s(now_s, job_s))

    def retry_after_s(self, now_s: float, job_s: float) -> float:
        """Returns the seconds until the present backlog has drained at the recent pace."""
        return retry_delay_s(len(self) * self._pace_s(now_s, job_s))

    def _pace_s(self, now_s: float, job_s: float) -> float:
        """Returns the seconds between dispatches; a longer wait since the last one counts as if a dispatch
        happened now."""
        pace_s = job_s if self._interval_s is None else self._interval_s
        if self._last_dispatch_s is None:
            return pace_s
        return max(pace_s, pace_s + SMOOTHING * (now_s - self._last_dispatch_s - pace_s))

    @property
    def suspects(self) -> Set[Job]:
        """Jobs that have to run alone, the oldest first."""
        return self._suspects.keys()

    def push(self, job: Job) -> None:
        self.num_added += 1
        if job.is_suspect:
            self._suspects[job] = None
        else:
            self._fair.push(job.priority, job.client, job)

    def push_front(self, jobs: Sequence[Job], now_s: float) -> None:
        """Queues retries ahead of all other jobs, in order within one event. They back off until `ready_s`,
        and are held until no verdict on a lost worker is due."""
        jobs = self._hold(jobs)
        for job in jobs:
            if job.ready_s <= now_s:
                (self._suspects if job.is_suspect else self._returning)[job] = None
        for job in reversed(jobs):
            if job.ready_s > now_s:
                self._backing_off.put(job, job.ready_s)

    def push_back(self, jobs: Sequence[Job]) -> None:
        """Queues jobs that gave up their places, or had none yet: they wait for their client's turn, ahead of
        its other jobs."""
        jobs = self._hold(jobs)
        self.num_added += len(jobs)
        for job in reversed(jobs):
            if job.is_suspect:
                self._suspects[job] = None
            else:
                self._fair.push(job.priority, job.client, job, is_first=True)

    def _hold(self, jobs: Sequence[Job]) -> list[Job]:
        """Holds the jobs that await a verdict; returns the others."""
        self._held.update((job, None) for job in jobs if job.awaits_verdict)
        return [job for job in jobs if job not in self._held]

    def pop_suspect(self, job: Job, now_s: float) -> Job:
        """Takes a job that is to run alone out for dispatch."""
        del self._suspects[job]
        self._note_dispatch(job, now_s)
        return job

    def favour(self, job: Job) -> None:
        """Moves a waiting job ahead of all others."""
        self.remove(job)
        self._front.put_first([job])

    def candidates(self) -> Iterator[Job]:
        """Yields at least the first job of each client that could be dispatched now."""
        yield from self._front.firsts()
        yield from self._fair.firsts()

    def head(self) -> Job | None:
        head, front = self._fair.head(), self._front.first()
        if front is None or head is None:
            return front or head
        is_first = front.priority <= head.priority or self._fair.is_floor_due
        return front if is_first else head

    def reconsider(self) -> None:
        """Some clients may run more than before."""
        self._fair.reconsider()

    def pop(self, now_s: float) -> Job:
        """Takes the head out for dispatch."""
        job = self._pop_head()
        self._note_dispatch(job, now_s)
        return job

    def pass_head(self) -> None:
        """Lets other jobs pass the head, which is large, until there is room for it."""
        self._passed.append(self._pop_head())

    def first_passed(self, num_running: Mapping[str, int]) -> Job | None:
        """Returns the job that is to be placed first of those that others have passed; `num_running`: what
        each client runs."""
        return self._passed.first(num_running)

    def has_turn_before(self, passed: Job) -> bool:
        """Whether it is the turn of a job whose client has had less than that of `passed`. The head may have
        come when nothing could be passed any more: without its turn it would wait for all that were."""
        head = self.head()
        if head is None or head.priority > passed.priority:
            return False
        return self.counters.of(head.client) < self.counters.of(passed.client)

    def pop_passed(self, job: Job, now_s: float) -> Job:
        """Takes a job that others have passed out for dispatch."""
        self._passed.discard(job)
        self._note_dispatch(job, now_s)
        return job

    def defer_passed(self, job: Job) -> None:
        """Lets a job that others have passed wait for its client's turn."""
        self._passed.discard(job)
        self.push_back([job])

    def return_passed(self) -> None:
        """Makes the jobs that others have passed the first ones again."""
        self._front.put_first(self._passed.clear())

    def _pop_head(self) -> Job:
        job = self.head()
        assert job is not None
        if self._fair.has_before(job.priority):
            job.live.keeps_place = True
        if self._front.discard(job):
            self._fair.served_elsewhere(job.priority)
        else:
            front = self._front.first()
            passes = front is not None and front.priority > job.priority
            self._fair.pop(job.priority, job.client, job, passes=passes)
        return job

    def _note_dispatch(self, job: Job, now_s: float) -> None:
        if self._last_dispatch_s is not None and job.queued_s < self._last_dispatch_s:
            interval_s = now_s - self._last_dispatch_s
            old_s = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = old_s + SMOOTHING * (interval_s - old_s)
        self._last_dispatch_s = now_s

    def remove(self, job: Job) -> None:
        """Takes a job out, wherever it waits."""
        places = (self._front, self._passed, self._backing_off)
        if self._fair.remove(job.priority, job.client, job) or any(place.discard(job) for place in places):
            return
        for place in (self._stranded, self._returning, self._suspects, self._held):
            place.pop(job, None)

    def strand_head(self, now_s: float) -> None:
        job = self.head()
        assert job is not None
        self.remove(job)
        self._stranded[job] = None
        self.await_worker(job, now_s)

    def await_worker(self, job: Job, now_s: float) -> None:
        """Counts from now, unless it does already, how long no ready worker could ever serve the job."""
        if job.awaits_worker_since_s is None:
            job.awaits_worker_since_s = now_s
            self._awaiting.append(job)

    def awaiting_since(self, begin_s: float) -> Iterator[Job]:
        """Takes out the jobs that have waited for a worker since `begin_s` or longer."""
        while (since_s := self.longest_awaiting_s()) is not None and since_s <= begin_s:
            job = self._awaiting.popleft()
            job.awaits_worker_since_s = None
            yield job

    def longest_awaiting_s(self) -> float | None:
        """Returns since when the job that waits longest for a worker does so."""
        while self._awaiting and self._awaiting[0] not in self._awaiting[0].live.jobs:
            self._awaiting.popleft()  # placed, or its request has ended
        return self._awaiting[0].awaits_worker_since_s if self._awaiting else None

    def unstrand(self) -> None:
        """Re-examines stranded jobs, in their order, after workers have changed."""
        stranded, self._stranded = self._stranded, {}
        self._returning = {job: None for job in stranded if job.live.dispatches} | self._returning
        self.push_back([job for job in stranded if not job.live.dispatches])

    def wake(self, now_s: float) -> list[Job]:
        """Puts returning jobs, and those whose backoff has elapsed, in front; returns the latter."""
        if self._returning:
            self.num_added += 1
            self._front.put_first(tuple(self._returning))
            self._returning.clear()
        due = self._backing_off.pop_due(now_s)
        self.num_added += len(due)
        for job in due:
            if job.is_suspect:
                self._suspects[job] = None
            else:
                self._front.put_first([job])
        return due

    def next_wake_s(self) -> float | None:
        return self._backing_off.next_s()


def retry_delay_s(expected_s: float) -> float:
    """Returns the retry delay for a client that could be served in `expected_s`."""
    return min(max(expected_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)


class Deadlines:
    """Live requests with a deadline, soonest first. Ended requests are removed lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, LiveRequest]] = []
        self._sequence = count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, live: LiveRequest, num_live: int) -> None:
        if live.request.deadline_s is None:
            return
        if len(self._heap) > 2 * num_live + 64:
            self._heap = [entry for entry in self._heap if not entry[2].state.is_over]
            heapify(self._heap)
        heappush(self._heap, (live.request.deadline_s, next(self._sequence), live))

    def expired(self, now_s: float) -> Iterable[LiveRequest]:
        """Takes out the requests whose deadline has passed while they were live."""
        while self._heap and self._heap[0][0] <= now_s:
            live = heappop(self._heap)[2]
            if not live.state.is_over:
                yield live

    def next_s(self) -> float | None:
        while self._heap and self._heap[0][2].state.is_over:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
