"""Jobs that are placed ahead of their clients' turns: retries, and those for which room has been made."""

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from .live_request import Job


class _Lane:
    """Jobs of one priority, in order; and those of each client."""

    __slots__ = ("jobs", "of_clients")

    def __init__(self) -> None:
        self.jobs: OrderedDict[Job, None] = OrderedDict()
        self.of_clients: dict[str, OrderedDict[Job, None]] = {}

    def put_first(self, job: Job) -> None:
        for jobs in (self.jobs, self.of_clients.setdefault(job.client, OrderedDict())):
            jobs[job] = None
            jobs.move_to_end(job, last=False)

    def remove(self, job: Job) -> None:
        del self.jobs[job], self.of_clients[job.client][job]
        if not self.of_clients[job.client]:
            del self.of_clients[job.client]


class FrontJobs:
    """The lowest number of a priority first; of one priority, those that were put there last. Each call takes
    constant time, however many jobs there are."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}  # none is empty
        self._priorities: list[int] = []  # sorted
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        for priority in self._priorities:
            yield from self._lanes[priority].jobs

    def firsts(self) -> Iterator[Job]:
        """Yields the first job of each priority and client."""
        for priority in self._priorities:
            yield from (next(iter(jobs)) for jobs in self._lanes[priority].of_clients.values())

    def first(self) -> Job | None:
        return next(iter(self), None)

    def put_first(self, jobs: Sequence[Job]) -> None:
        """Puts jobs ahead of the others of their priorities, in their order."""
        for job in reversed(jobs):
            if job.priority not in self._lanes:
                self._lanes[job.priority] = _Lane()
                insort(self._priorities, job.priority)
            self._lanes[job.priority].put_first(job)
        self._size += len(jobs)

    def discard(self, job: Job) -> bool:
        """Takes a job out; returns False when it is absent."""
        lane = self._lanes.get(job.priority)
        if lane is None or job not in lane.jobs:
            return False
        lane.remove(job)
        self._size -= 1
        if not lane.jobs:
            del self._lanes[job.priority]
            self._priorities.remove(job.priority)
        return True
