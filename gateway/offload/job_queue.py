"""Who is next. Pure: clients take turns, and each has one job at a time, so that one with many costly jobs keeps the others
waiting for one of them."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

from ...core.errors import QueueFull

T = TypeVar("T")

MAX_JOBS = 256
MAX_JOBS_EACH = 64
RETRY_S = 1.0


class JobQueue(Generic[T]):
    """Jobs that wait, of many clients. Their order within one client is kept."""

    def __init__(self, max_jobs: int = MAX_JOBS, max_jobs_each: int = MAX_JOBS_EACH) -> None:
        self._max_jobs = max_jobs
        self._max_jobs_each = max_jobs_each
        self._lanes: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn it is, then who comes next; none is empty
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    def push(self, client: str, job: T) -> None:
        """Raises QueueFull. A client that has nothing waiting finds a place longer than others do."""
        lane = self._lanes.get(client)
        limit = self._max_jobs_each if lane is not None else self._max_jobs
        if len(lane or ()) >= self._max_jobs_each or self._num_jobs >= self._max_jobs * (7 if lane is not None else 8) // 8:
            raise QueueFull(limit, RETRY_S)
        self._lanes.setdefault(client, deque()).append(job)
        self._num_jobs += 1

    def pop(self) -> T:
        """The next one; there is one. The client's next turn comes after those of all others."""
        client, lane = self._lanes.popitem(last=False)
        job = lane.popleft()
        if lane:
            self._lanes[client] = lane
        self._num_jobs -= 1
        return job

    def remove(self, client: str, job: T) -> None:
        """One that nobody waits for any more; nothing happens when it is not there."""
        lane = self._lanes.get(client, deque())
        if job in lane:
            lane.remove(job)
            self._num_jobs -= 1
            if not lane:
                del self._lanes[client]
