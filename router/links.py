"""Links between hosts on which KV transfers fail, for instance where a firewall lets each host reach the head
alone: their workers are paired last, so that requests do not pay for discovering this one by one.

A link is broken after two consecutive failures of transfers or probes. One that no transfer has used is
probed as soon as workers serve at both ends; one that has failed is probed after a back-off, which doubles
with each failure; a successful probe lets one request try. Failures of single requests are handled elsewhere
(`Job.failed_pairs`)."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from ..core.messages import Probed
from .cores import Key
from .registered_worker import RegisteredWorker, RoutingState
from .registry import Registry

NUM_FAILURES = 2  # consecutive; a single one may be a worker that died
PROBE_AGAIN_S = 4.0  # after the first failure: by then it is known whether a worker died
BACKOFF_S = 10.0  # after that; doubles with each failure
MAX_BACKOFF_S = 120.0
MAX_CONSIDERED = 1024  # pairs of hosts in one turn, or those of one host
MAX_PROBES = 256  # that begin in one turn
MAX_PROBES_OF_A_HOST = 32  # under way at once

Link = tuple[str, str]  # from host to host, by the ids that workers report


@dataclass(slots=True)
class _Breaker:
    """A link that has failed and not worked since."""

    num_failures: int = 0  # consecutive
    has_lost_kv: bool = False  # a transfer failed: a successful probe is not enough
    try_again_s: float = 0.0
    problem: str = ""


class Links:
    """A circuit breaker for each failed link, and the links that are to be probed.

    Each pair of hosts is considered once, when the second of them begins to serve, and again when a failed
    link is due: a turn that has nothing to probe looks at neither hosts nor links."""

    def __init__(self) -> None:
        self._breakers: dict[Link, _Breaker] = {}
        self._avoided: set[Link] = set()
        self._ends: dict[str, RegisteredWorker] = {}  # by host: a worker there that answers probes
        # by source host, then target: nothing is known of these links, or a failed one is due
        self._unknown: dict[str, dict[str, None]] = {}
        self._open: dict[str, None] = {}  # sources that may have something to ask of these
        # probes that have not been answered
        self._asked: dict[Link, tuple[RegisteredWorker, RegisteredWorker]] = {}
        self._links: dict[tuple[Key, Key], Link] = {}  # by the two workers of those
        self._num_asked: Counter[str] = Counter()  # by source host
        self._due: list[tuple[float, Link]] = []  # a heap: when breakers let a link be probed again
        self._are_ends_known = False
        self._considered: dict[str, None] = {}  # hosts whose links are known, or wanted
        self._new: deque[str] = deque()  # the others
        self._used: set[Link] = set()  # while there are others
        self._next_probe_s = inf

    def avoids(self, prefill: RegisteredWorker, decode: RegisteredWorker) -> bool:
        return bool(self._avoided) and _link(prefill, decode) in self._avoided

    def probes(self, registry: Registry, now_s: float) -> Iterator[tuple[RegisteredWorker, RegisteredWorker]]:
        """Yields pairs of workers, the first of which is to try to reach the second now; `probed` takes the
        answer. No more than a turn's, nor more than a host's at once."""
        if now_s < self._next_probe_s:
            return
        if not self._are_ends_known:
            self._note_ends({w.info.address.host_id: w for w in registry if _answers(w)})
        self._consider()
        while self._due and self._due[0][0] <= now_s:
            _, link = heappop(self._due)
            breaker = self._breakers.get(link)
            if breaker is not None and breaker.try_again_s <= now_s:
                self._want(link)
        num_left = MAX_PROBES
        while self._open and num_left:
            source, _ = self._open.popitem()
            targets = self._unknown.get(source, {})
            while targets and num_left and self._num_asked[source] < MAX_PROBES_OF_A_HOST:
                target, _ = targets.popitem()
                if self._is_worth_asking((source, target), now_s):
                    num_left -= 1
                    yield self._ask((source, target))
            if not num_left:
                self._open[source] = None
        self._next_probe_s = 0.0 if self._open or self._new else self._due[0][0] if self._due else inf

    def _is_worth_asking(self, link: Link, now_s: float) -> bool:
        breaker = self._breakers.get(link)
        is_due = breaker is None or breaker.try_again_s <= now_s
        return is_due and link not in self._asked and self._ends.keys() >= set(link)

    def _note_ends(self, ends: dict[str, RegisteredWorker]) -> None:
        self._ends, self._are_ends_known = ends, True
        self._considered = {host: None for host in self._considered if host in ends}
        self._unknown = {host: targets for host, targets in self._unknown.items() if host in ends}
        self._new = deque(host for host in ends if host not in self._considered)

    def _consider(self) -> None:
        """Considers the links of hosts that have begun to serve, as many as a turn allows."""
        num_left = MAX_CONSIDERED
        while self._new and num_left > 0:
            host = self._new.popleft()
            for other in self._considered:
                self._want((host, other))
                self._want((other, host))
            num_left -= len(self._considered)
            self._considered[host] = None
        if not self._new:
            self._used.clear()

    def _want(self, link: Link) -> None:
        if link not in self._used:
            self._unknown.setdefault(link[0], {})[link[1]] = None
            self._open[link[0]] = None

    def _ask(self, link: Link) -> tuple[RegisteredWorker, RegisteredWorker]:
        source, target = self._asked[link] = self._ends[link[0]], self._ends[link[1]]
        self._links[_key(source), _key(target)] = link
        self._num_asked[link[0]] += 1
        return source, target

    def _withdraw(self, link: Link) -> None:
        """The answer to a probe has come, or is no longer wanted: its host may have others to ask."""
        if (workers := self._asked.pop(link, None)) is not None:
            source, target = workers
            del self._links[_key(source), _key(target)]
            self._num_asked[link[0]] -= 1
            self._open[link[0]] = None
            self._next_probe_s = 0.0

    def workers_changed(self) -> None:
        """Records that a worker has started or stopped serving."""
        self._are_ends_known = False
        self._next_probe_s = 0.0

    def lost(self, worker: RegisteredWorker) -> None:
        """Reopens the probes and trials that involved a lost worker."""
        for link in [link for link, workers in self._asked.items() if worker in workers]:
            self._withdraw(link)
            self._want(link)
        self.workers_changed()

    def probed(self, event: Probed, now_s: float) -> None:
        """Records a probe's answer. Answers to probes that are no longer pending are ignored."""
        question = (event.worker_id, event.incarnation), (event.target_worker_id, event.target_incarnation)
        link = self._links.get(question)
        if link is not None:
            source, target = self._asked[link]
            self._withdraw(link)
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
        self._withdraw(link)
        self._unknown.get(link[0], {}).pop(link[1], None)
        if self._new or not self._are_ends_known:
            self._used.add(link)
        self._breakers.pop(link, None)
        self._avoided.discard(link)

    def failed(self, prefill: RegisteredWorker, decode: RegisteredWorker, error: str, now_s: float) -> None:
        """Records a failed transfer. Within a host there is no network to blame."""
        link = _link(prefill, decode)
        if link[0] == link[1]:
            return
        self._withdraw(link)  # from before
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
        backoff_s = PROBE_AGAIN_S
        if breaker.num_failures >= NUM_FAILURES:
            self._avoided.add(link)
            backoff_s = min(BACKOFF_S * 2.0 ** min(breaker.num_failures - NUM_FAILURES, 16), MAX_BACKOFF_S)
        breaker.try_again_s = now_s + backoff_s
        self._used.discard(link)
        heappush(self._due, (breaker.try_again_s, link))
        self._next_probe_s = min(self._next_probe_s, breaker.try_again_s)


def _link(prefill: RegisteredWorker, decode: RegisteredWorker) -> Link:
    return prefill.info.address.host_id, decode.info.address.host_id


def _key(worker: RegisteredWorker) -> Key:
    return worker.worker_id, worker.incarnation


def _answers(worker: RegisteredWorker) -> bool:
    """Whether probes reach it: also where it gets no dispatch for a while, so that its links are known when
    it does again."""
    return worker.state is not RoutingState.DRAINING and not worker.is_away
