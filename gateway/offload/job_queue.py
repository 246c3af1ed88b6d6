"""Who is next. Pure: clients take turns, with one job in each, so that one with many costly jobs keeps the
others waiting for one of them."""

from collections import OrderedDict, deque
from collections.abc import Container
from typing import Generic, TypeVar

from ...core.errors import QueueFull

T = TypeVar("T")

MAX_JOBS = 256
MAX_JOBS_EACH = 64
RETRY_S = 1.0


class IntakeQueue(Generic[T]):
    """Jobs that wait, of many clients. Their order within one client is kept."""

    def __init__(self, max_jobs: int = MAX_JOBS, max_jobs_each: int = MAX_JOBS_EACH) -> None:
        self._max_jobs = max_jobs
        self._max_jobs_each = max_jobs_each
        self._lanes: OrderedDict[str, deque[T]] = (
            OrderedDict()
        )  # whose turn it is, then who comes next; none is empty
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    def push(self, client: str, job: T) -> None:
        """Raises QueueFull. One place in eight is kept for clients that have nothing waiting."""
        lane = self._lanes.get(client, ())
        max_jobs = self._max_jobs * 7 // 8 if lane else self._max_jobs
        for num_jobs, limit in ((len(lane), self._max_jobs_each), (self._num_jobs, max_jobs)):
            if num_jobs >= limit:
                raise QueueFull(limit, RETRY_S)
        self._lanes.setdefault(client, deque()).append(job)
        self._num_jobs += 1

    def pop(self, after_others: Container[str] = ()) -> T:
        """The next one; there is one. The client's next turn comes after those of all others. `after_others`:
        clients whose turn it is only when nobody else waits."""
        client = next(
            (client for client in self._lanes if client not in after_others), next(iter(self._lanes))
        )
        lane = self._lanes.pop(client)
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
