"""Large jobs that others have passed, while there is no room for them. Pure."""

from collections.abc import Iterator, Mapping
from math import inf

from .fair_queue import TokenCounters
from .live_request import Job


class PassedJobs:
    """Each client's jobs in their order; the clients by what they run, so that one with many large jobs does
    not hold up another's. Those that run as much go by the tokens that they have had: in any fixed order, two
    clients whose jobs each fill a worker would alternate there, and the others would starve."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._lanes: dict[str, dict[Job, None]] = {}  # by client, none empty; ordered sets
        self._current = ""  # the client whose oldest job is the first

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Job]:
        for lane in self._lanes.values():
            yield from lane

    def append(self, job: Job) -> None:
        self._lanes.setdefault(job.client, {})[job] = None

    def first(self, num_running: Mapping[str, int]) -> Job | None:
        """Returns the oldest job of the client that runs least, by `num_running`, and has had least. It stays
        the first until it is taken out, or another client runs less."""
        if not self._lanes:
            return None
        least = min(self._lanes, key=lambda client: (num_running.get(client, 0), self._counters.of(client)))
        if self._current not in self._lanes or num_running.get(least, 0) < num_running.get(self._current, 0):
            self._current = least
        return next(iter(self._lanes[self._current]))

    def least_had(self) -> float:
        """Returns the tokens that the client has had which has had least; infinity when none waits here."""
        return min(map(self._counters.of, self._lanes), default=inf)

    def discard(self, job: Job) -> bool:
        """Takes a job out; returns False when it is absent."""
        lane = self._lanes.get(job.client)
        if lane is None or job not in lane:
            return False
        del lane[job]
        if not lane:
            del self._lanes[job.client]
        return True

    def clear(self) -> list[Job]:
        """Takes all jobs out."""
        jobs = list(self)
        self._lanes.clear()
        return jobs
