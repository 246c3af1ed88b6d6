"""Ways between hosts on which KV does not get through, as where a firewall lets each of them reach the head alone: their
workers are paired last, so that requests do not pay for finding out one by one.

A way is broken after two failures in a row. After a pause one request tries it again; the pause doubles with each that fails.
Failures of single requests are dealt with elsewhere (`Job.failed_pairs`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .registry import Registry, Worker, WorkerState

NUM_FAILURES = 2  # in a row; one may be a worker that died
PAUSE_S = 10.0
MAX_PAUSE_S = 120.0

Way = tuple[str, str]  # from host to host, by the ids that workers give


@dataclass(slots=True)
class _Link:
    num_failures: int = 0  # in a row
    try_again_s: float = 0.0
    problem: str = ""


class Links:
    """A circuit breaker for each way."""

    def __init__(self) -> None:
        self._links: dict[Way, _Link] = {}  # that have failed and not worked since
        self._avoided: set[Way] = set()

    def avoids(self, prefill: Worker, decode: Worker) -> bool:
        return bool(self._avoided) and _way(prefill, decode) in self._avoided

    def wake(self, now_s: float) -> None:
        """The next request may try what has been avoided for long enough."""
        if self._avoided:
            self._avoided = {way for way in self._avoided if self._links[way].try_again_s > now_s}

    def started(self, prefill: Worker, decode: Worker, now_s: float) -> None:
        """A request is on its way: nobody else tries a way that was broken before it is known how this one fares."""
        way = _way(prefill, decode)
        link = self._links.get(way)
        if link is not None and link.num_failures >= NUM_FAILURES:
            self._avoid(way, link, now_s)

    def worked(self, prefill: Worker, decode: Worker) -> None:
        way = _way(prefill, decode)
        self._links.pop(way, None)
        self._avoided.discard(way)

    def failed(self, prefill: Worker, decode: Worker, error: str, now_s: float) -> None:
        """A transfer did. Within a host there is no network to blame."""
        way = _way(prefill, decode)
        if way[0] == way[1]:
            return
        link = self._links.setdefault(way, _Link())
        link.num_failures += 1
        target = decode.info.address
        link.problem = (
            f"KV does not get from host {prefill.info.node} to host {decode.info.node} ({target.tcp_host}:{target.tcp_port}; "
            f"{error}): their workers are not paired; let all TCP between the hosts of the cluster through their firewalls"
        )
        if link.num_failures >= NUM_FAILURES:
            self._avoid(way, link, now_s)

    def problems(self, registry: Registry) -> Iterator[str]:
        """Describes broken ways between hosts whose workers serve."""
        there = {worker.info.address.host_id for worker in registry if worker.state is WorkerState.READY}
        for way, link in self._links.items():
            if link.num_failures >= NUM_FAILURES and there.issuperset(way):
                yield link.problem

    def _avoid(self, way: Way, link: _Link, now_s: float) -> None:
        pause_s = PAUSE_S * 2.0 ** min(link.num_failures - NUM_FAILURES, 16)
        link.try_again_s = now_s + min(pause_s, MAX_PAUSE_S)
        self._avoided.add(way)


def _way(prefill: Worker, decode: Worker) -> Way:
    return prefill.info.address.host_id, decode.info.address.host_id
