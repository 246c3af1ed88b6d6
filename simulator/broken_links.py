"""Links between hosts, as an observer of the head's connections sees them.

Where workers serve at both ends, a link is probed or used. After two consecutive failures, no request is sent
over it for a while unless there is no other place."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import permutations

from ..core.messages import Abort, HeldLeg, Leg, LegEnded, Prefill, Probe, WorkerCommand
from ..core.request import TransferId
from ..router.links import BACKOFF_S, NUM_FAILURES

Link = tuple[str, str]  # from host to host

SETTLE_S = 2.0  # how long workers may serve before their links must have been tried


class BrokenLinks:
    """The state of links according to the events of one router."""

    def __init__(self) -> None:
        self._under_way: dict[TransferId, Link] = {}
        # aborted, or decoded to the end: their failures are no longer meaningful
        self._over: set[TransferId] = set()
        self._num_failures: Counter[Link] = Counter()  # consecutive
        self._failed_s: dict[Link, float] = {}  # last
        self._tried: set[Link] = set()
        self._held: dict[tuple[TransferId, Leg], str] = {}  # legs of an earlier router, by host
        self._serving_s: dict[str, float] = {}  # start of service, by host

    def sent(self, host: str, command: WorkerCommand, now_s: float) -> bool:
        """Records a command to a worker on a host. Returns whether it uses a broken link."""
        if isinstance(command, Probe):
            self._tried.add((host, command.target.host_id))
        if isinstance(command, Abort):
            self._over.add(command.transfer)
        if not isinstance(command, Prefill) or command.target is None or command.target.host_id == host:
            return False
        link = self._under_way[command.spec.transfer] = host, command.target.host_id
        self._tried.add(link)
        return self._num_failures[link] >= NUM_FAILURES and now_s < self._failed_s[link] + BACKOFF_S

    def took_over(self, host: str, held: Iterable[HeldLeg]) -> None:
        """Records legs that a worker on a host received from an earlier router. One transfer's legs on two
        hosts have tried the link between them."""
        for leg in held:
            self._held[leg.spec.transfer, leg.leg] = host
            ends = tuple(self._held.get((leg.spec.transfer, side)) for side in (Leg.PREFILL, Leg.DECODE))
            if ends[0] is not None and ends[1] is not None:
                self._tried.add((ends[0], ends[1]))

    def heard(self, ended: LegEnded, now_s: float) -> None:
        link = self._under_way.pop(ended.transfer, None) if ended.leg is Leg.PREFILL else None
        is_over = ended.transfer in self._over
        if ended.leg is Leg.DECODE:
            self._over.add(ended.transfer)
        if link is None or ended.is_invalid:
            return
        if ended.stats is not None:
            self._num_failures[link] = 0
        elif ended.error is not None and not is_over:
            self._num_failures[link] += 1
            self._failed_s[link] = now_s

    def untried(self, serving: Iterable[str], now_s: float) -> Iterator[Link]:
        """Yields untried links between hosts on which workers have served for a while."""
        self._serving_s = {host: self._serving_s.get(host, now_s) for host in serving}
        settled = [host for host, since_s in self._serving_s.items() if now_s - since_s >= SETTLE_S]
        yield from (link for link in permutations(settled, 2) if link not in self._tried)
