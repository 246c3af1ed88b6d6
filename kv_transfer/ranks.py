"""The transfers of an instance of several ranks, each of which has an endpoint of its own beside its blocks.

    worker -> InstancePort (rank 0) --commands--> RankPort (each other rank) -> its endpoint
    worker <- InstancePort          <---ends----- RankPort                   <- its endpoint

The worker deals with one port, as it deals with one endpoint where there is one rank. The messages travel on
whatever connects the ranks. A rank gets its commands in the order of the steps, on the thread that computes
them: "computed" follows the step that has computed it."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from ..core.failures import FailureKind
from ..core.messages import TransferAddress, TransferStats
from ..core.request import TransferId
from .events import (
    CancelTransfer,
    CommitReady,
    Expect,
    Extend,
    OpenTransfer,
    PartComputed,
    PrefillDone,
    ReceivedMessage,
    ReceiveFailed,
    SendFailed,
    Sent,
)
from .interfaces import TransferListener, TransferPort
from .parted import Failure, PartedTransfers, total
from .parts import Share, parts
from .span import Span


class ExpectFrom(msgspec.Struct, frozen=True, tag=True):
    """Blocks are reserved for the parts that come from the ranks of `source` (worker_id, incarnation)."""

    source: tuple[str, int]
    num_source_ranks: int
    reservation: Expect


class SendTo(msgspec.Struct, frozen=True, tag=True):
    """A transfer to the ranks of `target` begins."""

    target: TransferAddress
    opening: OpenTransfer


RankCommand = ExpectFrom | SendTo | Extend | PartComputed | PrefillDone | CommitReady | CancelTransfer
RankEnd = ReceivedMessage | ReceiveFailed | Sent | SendFailed
Port = TypeVar("Port", bound=TransferPort)
_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[RankCommand] = msgspec.msgpack.Decoder(RankCommand)
_ends: msgspec.msgpack.Decoder[RankEnd] = msgspec.msgpack.Decoder(RankEnd)


class Ends:
    """Implements `TransferListener`: makes each end a message."""

    def __init__(self, report: Callable[[RankEnd], None]) -> None:
        self._report = report

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._report(ReceivedMessage(transfer, payload))

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._report(ReceiveFailed(transfer, error, kind))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._report(Sent(transfer, stats))

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._report(SendFailed(transfer, error, kind))


class RankPort(Generic[Port]):
    """A rank's end of its instance's transfers; not rank 0's."""

    def __init__(self, make: Callable[[TransferListener], Port], report: Callable[[bytes], None]) -> None:
        """`make` returns the rank's own endpoint, which reports to the listener that it is given; `report`
        carries a message to `InstancePort.on_end`, from any thread."""
        self._report = report
        self.own = make(Ends(self._send))

    def on_command(self, data: bytes) -> None:
        """Carries out a message of rank 0; called on the thread that computes steps."""
        command = _commands.decode(data)
        try:
            _carry_out(self.own, command)
        except (ValueError, RuntimeError) as error:  # else rank 0 would wait for the end of this part
            if isinstance(command, ExpectFrom):
                self._send(ReceiveFailed(command.reservation.transfer, str(error), FailureKind.DISAGREEMENT))
            elif isinstance(command, SendTo):
                self._send(SendFailed(command.opening.transfer, str(error), FailureKind.DISAGREEMENT))
            else:
                raise

    def _send(self, end: RankEnd) -> None:
        self._report(_encoder.encode(end))


def _carry_out(port: TransferPort, command: RankCommand) -> None:
    match command:
        case ExpectFrom(reservation=event):
            port.expect(
                event.transfer,
                command.source,
                event.block_ids,
                event.num_tokens,
                event.num_cached_tokens,
                command.num_source_ranks,
            )
        case SendTo(opening=event):
            port.send(event.transfer, command.target, event.block_ids, event.num_tokens)
        case Extend():
            port.extend(command.transfer, command.block_ids)
        case PartComputed(span=span):
            port.computed(
                command.transfer, span.layer_start, span.layer_end, span.token_start, span.token_end
            )
        case PrefillDone():
            port.prefill_done(command.transfer)
        case CommitReady():
            port.commit(command.transfer, command.payload)
        case CancelTransfer():
            port.cancel(command.transfer, command.error, command.kind)


class InstancePort(Generic[Port]):
    """Rank 0's end of its instance's transfers; implements `TransferPort`. Thread-safe, as an endpoint is."""

    def __init__(
        self,
        make: Callable[[TransferListener], Port],
        listener: TransferListener,
        share: Share,
        command: Callable[[int, bytes], None],
    ) -> None:
        """`make` returns rank 0's own endpoint, which reports to the listener that it is given; `share` is
        rank 0's. `command` carries a message to a rank's `RankPort.on_command`, from any thread, behind all
        messages and steps before it."""
        assert share.rank == 0
        self._share = share
        self._command = command
        self._lock = threading.RLock()  # guards the two below
        self._sends: PartedTransfers[int, TransferStats] = PartedTransfers(
            self._abort,
            lambda transfer, stats: listener.on_sent(transfer, total(stats)),
            listener.on_send_failed,
        )
        self._receives: PartedTransfers[int, bytes] = PartedTransfers(
            self._abort,
            lambda transfer, payloads: listener.on_received(transfer, payloads[0]),
            listener.on_receive_failed,
        )
        self.own = make(Ends(partial(self._end, 0)))

    # the worker's calls

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Sequence[int],
        num_tokens: int,
        num_cached_tokens: int = 0,
        num_source_ranks: int = 1,
    ) -> None:
        reservation = Expect(transfer, tuple(block_ids), num_tokens, num_cached_tokens)
        command = ExpectFrom(source, num_source_ranks, reservation)
        with self._lock:
            self._open(self._receives, transfer, range(self._share.num_ranks), command)

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Sequence[int], num_tokens: int
    ) -> None:
        share = self._share
        moved = parts(share.num_kv_heads, share.num_ranks, target.num_ranks)
        command = SendTo(target, OpenTransfer(transfer, tuple(block_ids), num_tokens))
        with self._lock:
            self._open(self._sends, transfer, sorted({part.sender for part in moved}), command)

    def extend(self, transfer: TransferId, block_ids: Sequence[int]) -> None:
        self._feed(Extend(transfer, tuple(block_ids)))

    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None:
        self._feed(PartComputed(transfer, Span(layer_start, layer_end, token_start, token_end)))

    def prefill_done(self, transfer: TransferId) -> None:
        self._feed(PrefillDone(transfer))

    def commit(self, transfer: TransferId, payload: bytes) -> None:
        """The payload travels between the two ranks 0 alone."""
        with self._lock:
            for rank in self._sends.open_parts(transfer):
                self._tell((rank,), CommitReady(transfer, b"" if rank else payload))

    def cancel(
        self, transfer: TransferId, error: str = "cancelled", kind: FailureKind = FailureKind.CANCELLED
    ) -> None:
        with self._lock:
            ranks = {*self._sends.open_parts(transfer), *self._receives.open_parts(transfer)}
            self._tell(sorted(ranks), CancelTransfer(transfer, error, kind))

    # the ranks' ends

    @property
    def num_open(self) -> int:
        """The number of transfers that have not ended."""
        with self._lock:
            return len(self._sends) + len(self._receives)

    def on_end(self, rank: int, data: bytes) -> None:
        """Takes a message of another rank; called on any thread."""
        self._end(rank, _ends.decode(data))

    def close(self, error: str) -> None:
        """Fails what is still open: the ranks end, or will not report any more."""
        with self._lock:
            self._sends.close(error)
            self._receives.close(error)

    def _end(self, rank: int, end: RankEnd) -> None:
        with self._lock:
            match end:
                case Sent():
                    self._sends.committed(rank, end.transfer, end.stats)
                case SendFailed():
                    self._sends.failed(rank, end.transfer, Failure(end.error, end.kind))
                case ReceivedMessage():
                    self._receives.committed(rank, end.transfer, end.payload)
                case ReceiveFailed():
                    self._receives.failed(rank, end.transfer, Failure(end.error, end.kind))

    def _open(
        self,
        transfers: PartedTransfers[int, Any],
        transfer: TransferId,
        ranks: Sequence[int],
        command: ExpectFrom | SendTo,
    ) -> None:
        transfers.open(transfer, ranks, lambda rank: self._tell((rank,), command))

    def _abort(self, rank: int, transfer: TransferId, failure: Failure) -> None:
        self._tell((rank,), CancelTransfer(transfer, *failure))

    def _feed(self, command: Extend | PartComputed | PrefillDone) -> None:
        with self._lock:
            self._tell(self._sends.open_parts(command.transfer), command)

    def _tell(self, ranks: Sequence[int], command: RankCommand) -> None:
        data = _encoder.encode(command) if any(ranks) else b""
        for rank in ranks:
            if rank:
                self._command(rank, data)
            else:
                _carry_out(self.own, command)
