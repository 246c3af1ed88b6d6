"""Ways between hosts that have failed twice in a row, as a bystander of the head's connections counts them: for a while, no
request is sent over one but for want of another place."""

from collections import Counter

from ..core.messages import Abort, Leg, LegEnded, Prefill, WorkerCommand
from ..core.request import TransferId
from ..router.links import NUM_FAILURES, PAUSE_S

Key = tuple[str, int]  # (worker_id, incarnation)
Way = tuple[str, str]  # from host to host


class BrokenWays:
    """By what one router hears."""

    def __init__(self) -> None:
        self._under_way: dict[TransferId, Way] = {}
        self._over: set[TransferId] = set()  # aborted, or decoded to the end: their failures say nothing any more
        self._num_failures: Counter[Way] = Counter()  # in a row
        self._failed_s: dict[Way, float] = {}  # last

    def sent(self, host: str, command: WorkerCommand, now_s: float) -> bool:
        """To a worker on a host. Whether it goes over a way that is broken."""
        if isinstance(command, Abort):
            self._over.add(command.transfer)
        if not isinstance(command, Prefill) or command.target is None or command.target.host_id == host:
            return False
        way = self._under_way[command.spec.transfer] = host, command.target.host_id
        return self._num_failures[way] >= NUM_FAILURES and now_s < self._failed_s[way] + PAUSE_S

    def heard(self, ended: LegEnded, now_s: float) -> None:
        way = self._under_way.pop(ended.transfer, None) if ended.leg is Leg.PREFILL else None
        is_over = ended.transfer in self._over
        if ended.leg is Leg.DECODE:
            self._over.add(ended.transfer)
        if way is None or ended.is_invalid:
            return
        if ended.stats is not None:
            self._num_failures[way] = 0
        elif ended.error is not None and not is_over:
            self._num_failures[way] += 1
            self._failed_s[way] = now_s
