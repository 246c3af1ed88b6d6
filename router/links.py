"""Links between hosts on which KV transfers fail, for instance where a firewall lets each host reach the head
alone: their workers are paired last, so that requests do not pay for discovering this one by one.

A link is broken after two consecutive failures of transfers or probes. One that no transfer has used is
probed as soon as workers serve at both ends; one that has failed is probed after a back-off, which doubles
with each failure; a successful probe lets one request try. Failures of single requests are handled elsewhere
(`Job.failed_pairs`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import inf

from ..core.messages import Probed
from .registry import RegisteredWorker, Registry, RoutingState

NUM_FAILURES = 2  # consecutive; a single one may be a worker that died
PROBE_AGAIN_S = 4.0  # after the first failure: by then it is known whether a worker died
BACKOFF_S = 10.0  # after that; doubles with each failure
MAX_BACKOFF_S = 120.0

Link = tuple[str, str]  # from host to host, by the ids that workers report


@dataclass(slots=True)
class _Breaker:
    """A link that has failed and not worked since."""

    num_failures: int = 0  # consecutive
    has_lost_kv: bool = False  # a transfer failed: a successful probe is not enough
    try_again_s: float = 0.0
    problem: str = ""


class Links:
    """A circuit breaker for each failed link, and the knowledge about the others."""

    def __init__(self) -> None:
        self._breakers: dict[Link, _Breaker] = {}
        self._avoided: set[Link] = set()
        # links on which a transfer or a probe has succeeded and nothing has failed since
        self._passed: set[Link] = set()
        self._asked: dict[
            Link, tuple[RegisteredWorker, RegisteredWorker]
        ] = {}  # probes that have not been answered
        self._next_probe_s = inf

    def avoids(self, prefill: RegisteredWorker, decode: RegisteredWorker) -> bool:
        return bool(self._avoided) and _link(prefill, decode) in self._avoided

    def probes(self, registry: Registry, now_s: float) -> Iterator[tuple[RegisteredWorker, RegisteredWorker]]:
        """Yields pairs of workers, the first of which is to try to reach the second now; `probed` takes the
        answer."""
        if now_s < self._next_probe_s:
            return
        ends = {worker.info.address.host_id: worker for worker in registry if _answers(worker)}
        self._passed = {link for link in self._passed if ends.keys() >= set(link)}
        self._next_probe_s = inf
        for link in permutations(ends, 2):
            if link in self._passed or link in self._asked:
                continue
            breaker = self._breakers.get(link)
            if breaker is not None and now_s < breaker.try_again_s:
                self._next_probe_s = min(self._next_probe_s, breaker.try_again_s)
                continue
            self._asked[link] = source, target = ends[link[0]], ends[link[1]]
            yield source, target

    def workers_changed(self) -> None:
        """Records that a worker has started or stopped serving."""
        self._next_probe_s = 0.0

    def lost(self, worker: RegisteredWorker) -> None:
        """Reopens the probes and trials that involved a lost worker."""
        self._asked = {link: workers for link, workers in self._asked.items() if worker not in workers}
        self.workers_changed()

    def probed(self, event: Probed, now_s: float) -> None:
        """Records a probe's answer. Answers to probes that are no longer pending are ignored."""
        question = (event.worker_id, event.incarnation), (event.target_worker_id, event.target_incarnation)
        for link, (source, target) in list(self._asked.items()):
            if question == (_key(source), _key(target)):
                del self._asked[link]
                self._answered(link, source, target, event.error, now_s)

    def started(self, prefill: RegisteredWorker, decode: RegisteredWorker, now_s: float) -> None:
        """Records a dispatch: no other request tries a link that was broken until the outcome of this one is
        known."""
        link = _link(prefill, decode)
        breaker = self._breakers.get(link)
        if breaker is not None and breaker.num_failures >= NUM_FAILURES:
            self._back_off(link, breaker, now_s)

    def worked(self, prefill: RegisteredWorker, decode: RegisteredWorker) -> None:
        link = _link(prefill, decode)
        self._asked.pop(link, None)
        self._breakers.pop(link, None)
        self._avoided.discard(link)
        self._passed.add(link)

    def failed(self, prefill: RegisteredWorker, decode: RegisteredWorker, error: str, now_s: float) -> None:
        """Records a failed transfer. Within a host there is no network to blame."""
        link = _link(prefill, decode)
        if link[0] == link[1]:
            return
        self._asked.pop(link, None)  # from before
        self._breakers.setdefault(link, _Breaker()).has_lost_kv = True
        self._fail(link, prefill, decode, error, now_s)

    def problems(self, registry: Registry) -> Iterator[str]:
        """Describes broken links between hosts whose workers serve."""
        there = {worker.info.address.host_id for worker in registry if worker.state is RoutingState.READY}
        for link, breaker in self._breakers.items():
            if breaker.num_failures >= NUM_FAILURES and there.issuperset(link):
                yield breaker.problem

    def _answered(
        self, link: Link, source: RegisteredWorker, target: RegisteredWorker, error: str, now_s: float
    ) -> None:
        if error:
            self._fail(link, source, target, error, now_s)
            return
        self._passed.add(link)
        self._avoided.discard(link)
        breaker = self._breakers.get(link)
        if breaker is not None and not breaker.has_lost_kv:
            del self._breakers[link]

    def _fail(
        self, link: Link, source: RegisteredWorker, target: RegisteredWorker, error: str, now_s: float
    ) -> None:
        breaker = self._breakers.setdefault(link, _Breaker())
        breaker.num_failures += 1
        address = target.info.address
        breaker.problem = (
            f"KV does not get from host {source.info.node} to host {target.info.node}"
            f" ({address.tcp_host}:{address.tcp_port}; {error}): their workers are not paired; let all TCP"
            " between the hosts of the cluster through their firewalls"
        )
        self._back_off(link, breaker, now_s)

    def _back_off(self, link: Link, breaker: _Breaker, now_s: float) -> None:
        self._passed.discard(link)
        backoff_s = PROBE_AGAIN_S
        if breaker.num_failures >= NUM_FAILURES:
            self._avoided.add(link)
            backoff_s = min(BACKOFF_S * 2.0 ** min(breaker.num_failures - NUM_FAILURES, 16), MAX_BACKOFF_S)
        breaker.try_again_s = now_s + backoff_s
        self._next_probe_s = min(self._next_probe_s, breaker.try_again_s)


def _link(prefill: RegisteredWorker, decode: RegisteredWorker) -> Link:
    return prefill.info.address.host_id, decode.info.address.host_id


def _key(worker: RegisteredWorker) -> tuple[str, int]:
    return worker.worker_id, worker.incarnation


def _answers(worker: RegisteredWorker) -> bool:
    """Whether probes reach it: also where it gets no dispatch for a while, so that its links are known when
    it does again."""
    return worker.state is not RoutingState.DRAINING and not worker.is_away
