"""A transfer that is the set of its parts: committed once all are, failed once when one of them has failed
and none is under way any more.

Two levels join parts in this way: a rank's hub those of its pairs, and rank 0's port those of its instance's
ranks. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..core.failures import FailureKind
from ..core.messages import TransferStats
from ..core.request import TransferId

P = TypeVar("P")  # names a part
R = TypeVar("R")  # what a part ends with when it is committed


class Failure(NamedTuple):
    """Why a transfer or a part of it has failed."""

    error: str
    kind: FailureKind


class PartedTransfer(Generic[P, R]):
    """One direction's view of one transfer. Late and repeated ends of parts change nothing."""

    def __init__(self, parts: Iterable[P]) -> None:
        self._results: dict[P, R | None] = dict.fromkeys(parts)  # in their order
        self._open = set(self._results)
        self.failure: Failure | None = None

    @property
    def open_parts(self) -> list[P]:
        """The parts that are under way: a failed one reads or writes no blocks any more."""
        return [part for part in self._results if part in self._open]

    @property
    def is_over(self) -> bool:
        return not self._open

    @property
    def results(self) -> list[R]:
        """The results of the committed parts, in the order of the parts."""
        return [result for result in self._results.values() if result is not None]

    def committed(self, part: P, result: R) -> bool:
        """Returns whether the part was under way."""
        if part not in self._open:
            return False
        self._open.remove(part)
        self._results[part] = result
        return True

    def failed(self, part: P, failure: Failure) -> bool:
        """Returns whether the part was under way. The first failure is the transfer's: others follow from
        it."""
        if part not in self._open:
            return False
        self._open.remove(part)
        self.failure = self.failure or failure
        return True


class PartedTransfers(Generic[P, R]):
    """All transfers of one direction."""

    def __init__(
        self,
        abort: Callable[[P, TransferId, Failure], None],
        on_committed: Callable[[TransferId, list[R]], None],
        on_failed: Callable[[TransferId, str, FailureKind], None],
    ) -> None:
        """`abort` gives a part up, which ends like any other; it may end before `abort` returns.
        `on_committed` receives the results in the order of the parts. Each opened transfer ends in exactly
        one call of the latter two."""
        self._abort = abort
        self._on_committed = on_committed
        self._on_failed = on_failed
        self._transfers: dict[TransferId, PartedTransfer[P, R]] = {}

    def __len__(self) -> int:
        return len(self._transfers)

    def open(self, transfer: TransferId, parts: Iterable[P], begin: Callable[[P], None]) -> None:
        """Begins each part; when one fails at once, those behind it are not begun. Raises what `begin` raises
        for the first part, and nothing is open then."""
        assert transfer not in self._transfers, f"{transfer} is under way already"
        parted = self._transfers[transfer] = PartedTransfer(parts)
        first, *others = parted.open_parts
        try:
            begin(first)
        except BaseException:
            del self._transfers[transfer]
            raise
        for part in others:
            if parted.failure is None:
                begin(part)
            else:
                self.failed(part, transfer, parted.failure)

    def open_parts(self, transfer: TransferId) -> list[P]:
        """Returns the parts of a transfer that are under way; none of an unknown one."""
        parted = self._transfers.get(transfer)
        return [] if parted is None else parted.open_parts

    def committed(self, part: P, transfer: TransferId, result: R) -> None:
        parted = self._transfers.get(transfer)
        if parted is not None and parted.committed(part, result):
            self._settle(transfer, parted)

    def failed(self, part: P, transfer: TransferId, failure: Failure) -> None:
        parted = self._transfers.get(transfer)
        if parted is None:
            return
        is_first = parted.failure is None
        if not parted.failed(part, failure):
            return
        if is_first:
            for other in parted.open_parts:
                self._abort(other, transfer, failure)
        if self._transfers.get(transfer) is parted:  # else the last of the aborted parts has ended it
            self._settle(transfer, parted)

    def close(self, error: str) -> None:
        """Fails all transfers, as no part will end any more."""
        for transfer in list(self._transfers):
            del self._transfers[transfer]
            self._on_failed(transfer, error, FailureKind.LOST)

    def _settle(self, transfer: TransferId, parted: PartedTransfer[P, R]) -> None:
        if not parted.is_over:
            return
        del self._transfers[transfer]
        if parted.failure is None:
            self._on_committed(transfer, parted.results)
        else:
            self._on_failed(transfer, *parted.failure)


@dataclass(frozen=True)
class PartListener(Generic[P]):
    """The `TransferListener` of one part."""

    part: P
    sends: PartedTransfers[P, TransferStats]
    receives: PartedTransfers[P, bytes]

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self.receives.committed(self.part, transfer, payload)

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self.receives.failed(self.part, transfer, Failure(error, kind))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self.sends.committed(self.part, transfer, stats)

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self.sends.failed(self.part, transfer, Failure(error, kind))


def total(stats: Sequence[TransferStats]) -> TransferStats:
    """Returns the cost of parts that were sent side by side."""
    if len(stats) == 1:
        return stats[0]
    return TransferStats(
        num_bytes=sum(each.num_bytes for each in stats),
        num_chunks=sum(each.num_chunks for each in stats),
        duration_s=max(each.duration_s for each in stats),
        exposed_s=max(each.exposed_s for each in stats),
        hidden_bytes=sum(each.hidden_bytes for each in stats),
    )
