"""Chooses the next job. Pure: clients take turns, with one job each, so that a client with many costly jobs
delays the others by at most one of them."""

from collections import OrderedDict, deque
from collections.abc import Container
from typing import Generic, TypeVar

from ...core.errors import QueueFull

T = TypeVar("T")

MAX_JOBS = 256
MAX_JOBS_EACH = 64
RETRY_S = 1.0


class IntakeQueue(Generic[T]):
    """The waiting jobs of many clients. Their order within one client is kept."""

    def __init__(self, max_jobs: int = MAX_JOBS, max_jobs_each: int = MAX_JOBS_EACH) -> None:
        self._max_jobs = max_jobs
        self._max_jobs_each = max_jobs_each
        # the client whose turn it is first, then the following ones; none is empty
        self._lanes: OrderedDict[str, deque[T]] = OrderedDict()
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    def push(self, client: str, job: T) -> None:
        """Adds a job. Raises QueueFull. One place in eight is reserved for clients that have no waiting
        job."""
        lane = self._lanes.get(client, ())
        max_jobs = self._max_jobs * 7 // 8 if lane else self._max_jobs
        for num_jobs, limit in ((len(lane), self._max_jobs_each), (self._num_jobs, max_jobs)):
            if num_jobs >= limit:
                raise QueueFull(limit, RETRY_S)
        self._lanes.setdefault(client, deque()).append(job)
        self._num_jobs += 1

    def pop(self, after_others: Container[str] = ()) -> T:
        """Removes and returns the next job; there must be one. The client's next turn comes after those of
        all others. `after_others`: clients whose turn comes only when no other client waits."""
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
        """Removes a job that is no longer needed; does nothing if it is not there."""
        lane = self._lanes.get(client, deque())
        if job in lane:
            lane.remove(job)
            self._num_jobs -= 1
            if not lane:
                del self._lanes[client]
