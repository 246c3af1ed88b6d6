"""D's half of a pair, without I/O: reservations and the peer's messages come in; receives, writes and endings
go out.

Expect + OFFER (either first) -> ACCEPT -> CHUNK: size checked -> Receive -> Arrived -> Store -> Stored -> ACK
COMMIT, when every (layer, token) was announced exactly once and all is stored -> COMMITTED, Received
"""

from typing import NamedTuple

from ..core.automaton import Automaton
from ..core.failures import FailureKind
from ..core.messages import KVLayout
from ..core.request import TransferId
from .config import TransferConfig
from .counters import TransferCounters
from .events import (
    Arrived,
    CancelTransfer,
    CloseLink,
    Corrupt,
    Expect,
    LinkDown,
    LinkUp,
    PeerGone,
    Receive,
    ReceivedMessage,
    ReceiveFailed,
    ReceiverCommand,
    ReceiverEvent,
    ReleaseLink,
    Send,
    Store,
    Stored,
    StoreFailed,
    TransferTick,
)
from .idle_links import LinkUse
from .inbound_transfer import InboundTransfer
from .protocol import (
    AbortTransfer,
    Accept,
    Ack,
    Commit,
    Committed,
    KVChunk,
    LinkHeartbeat,
    LinkUnneeded,
    Nack,
    OfferTransfer,
)
from .states import LINK_TRANSITIONS, InboundState, LinkState


class _UnderWay(NamedTuple):
    chunk: KVChunk
    transfer: InboundTransfer | None  # None: it had ended already, the bytes are received and dropped


class TransferReceiver:
    """All transfers from one peer. A transfer that has ended is in no table, so that nothing can be written
    for it.

    Its lease runs until offer and reservation have met: short when the peer is silent, long while it is
    alive, since either side may rightly be busy with others. From then on the blocks are held for as long as
    the link is up."""

    def __init__(
        self, layout: KVLayout, config: TransferConfig, counters: TransferCounters, peer: str
    ) -> None:
        self._layout = layout
        self._bytes_per_cell = layout.wire_bytes_per_cell
        self._config = config
        self._counters = counters
        self._link = Automaton(LINK_TRANSITIONS, LinkState.DOWN, name=f"link from {peer}")
        self._epoch: int | None = None
        self._num_slots = 0
        self._slot_bytes = 0
        self._last_seq = -1
        self._under_way: dict[int, _UnderWay] = {}  # by seq
        self._transfers: dict[TransferId, InboundTransfer] = {}
        # cancelled before their offer arrived, by when they are forgotten
        self._refused: dict[TransferId, tuple[CancelTransfer, float]] = {}
        self._now_s = 0.0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._used_s = 0.0
        self._out: list[ReceiverCommand] = []

    @property
    def is_idle(self) -> bool:
        """Whether this object holds no state that would be lost with it."""
        return self._link.state is LinkState.DOWN and not self._transfers and not self._refused

    @property
    def use(self) -> LinkUse | None:
        """The use of the link; None while there is none."""
        if self._link.state is LinkState.DOWN:
            return None
        return LinkUse(self._used_s, bool(self._transfers or self._under_way))

    def handle(self, event: ReceiverEvent, now_s: float) -> list[ReceiverCommand]:
        """Returns the commands that answer `event`, in order."""
        self._now_s = now_s
        self._out = []
        match event:
            case KVChunk() | OfferTransfer() | Commit() | AbortTransfer() | LinkHeartbeat():
                self._on_message(event)
            case Arrived() | Stored() | Corrupt() | StoreFailed():
                if event.epoch == self._epoch:
                    self._on_chunk_progress(event)
            case Expect():
                self._on_expect(event)
            case CancelTransfer():
                self._on_cancel(event)
            case LinkUp():
                self._on_link_up(event)
            case LinkDown():
                if event.epoch == self._epoch and self._link.state is LinkState.UP:
                    self._link_lost(event.error, FailureKind.LOST)
            case ReleaseLink():
                if self._link.state is LinkState.UP:
                    self._send(LinkUnneeded(self._epoch or 0))
            case PeerGone():
                self._close_link(event.error, FailureKind.LOST)
                for transfer in list(self._transfers.values()):
                    self._fail(transfer, event.error, FailureKind.LOST)
            case TransferTick():
                self._on_tick()
        return self._out

    # from the worker

    def _on_expect(self, event: Expect) -> None:
        transfer = self._transfers.get(event.transfer)
        if transfer is None:
            transfer = InboundTransfer(event.transfer, InboundState.EXPECTED, self._now_s)
            self._transfers[event.transfer] = transfer
        assert transfer.reservation is None, f"{event.transfer} is expected already"
        transfer.reservation = event
        if transfer.state is InboundState.OFFERED:
            self._accept(transfer)

    def _on_cancel(self, event: CancelTransfer) -> None:
        if (transfer := self._transfers.get(event.transfer)) is None:
            return
        if transfer.state is InboundState.EXPECTED:
            self._refused[transfer.id] = event, self._now_s + self._config.max_lease_s
        self._fail(transfer, event.error, event.kind)

    # from the link and the peer

    def _on_link_up(self, event: LinkUp) -> None:
        self._link.transition(LinkState.UP)
        self._epoch = event.epoch
        self._num_slots, self._slot_bytes = event.num_slots, event.slot_bytes
        self._last_seq = -1
        self._heard_s = self._beat_s = self._used_s = self._now_s
        self._counters.num_links_opened += 1

    def _on_message(self, message: KVChunk | OfferTransfer | Commit | AbortTransfer | LinkHeartbeat) -> None:
        if message.epoch != self._epoch:
            self._counters.num_stale_messages += 1
            return
        self._heard_s = self._now_s
        if isinstance(message, KVChunk):
            self._on_chunk(message)
        elif isinstance(message, OfferTransfer):
            self._on_offer(message)
        elif not isinstance(message, LinkHeartbeat):
            transfer = self._transfers.get(message.transfer)
            if transfer is None or transfer.state is InboundState.EXPECTED:
                self._counters.num_stale_messages += 1
            elif isinstance(message, AbortTransfer):
                self._end(transfer, InboundState.FAILED)
                self._report_failure(transfer, message.error, message.kind)
            else:
                self._on_commit(transfer, message)

    def _on_offer(self, offer: OfferTransfer) -> None:
        if (refused := self._refused.pop(offer.transfer, None)) is not None:
            cancel, _ = refused
            is_own = cancel.kind is FailureKind.CANCELLED
            error = "cancelled by the receiver" if is_own else cancel.error
            self._send(AbortTransfer(offer.epoch, offer.transfer, error, cancel.kind))
            return
        transfer = self._transfers.get(offer.transfer)
        if transfer is None:
            transfer = InboundTransfer(offer.transfer, InboundState.OFFERED, self._now_s)
            self._transfers[offer.transfer] = transfer
        elif transfer.state is not InboundState.EXPECTED:
            self._nack(offer.transfer, "it was offered before")
            return
        transfer.num_offered_tokens = offer.num_tokens
        if transfer.state is InboundState.EXPECTED:
            self._accept(transfer)

    def _accept(self, transfer: InboundTransfer) -> None:
        try:
            transfer.begin(self._layout.num_layers)
        except ValueError as error:
            self._fail(transfer, str(error), FailureKind.DISAGREEMENT)
            return
        self._send(Accept(self._epoch or 0, transfer.id, transfer.num_cached_tokens, self._num_slots))

    def _on_chunk(self, chunk: KVChunk) -> None:
        transfer = self._transfers.get(chunk.transfer)
        error = self._refusal(chunk, transfer)
        if error is not None:
            self._nack(chunk.transfer, error)
            return
        if transfer is None:
            self._counters.num_stale_messages += 1
        self._last_seq = chunk.seq
        self._under_way[chunk.seq] = _UnderWay(chunk, transfer)
        self._out.append(Receive(chunk))

    def _refusal(self, chunk: KVChunk, transfer: InboundTransfer | None) -> str | None:
        """Returns why the bytes of `chunk` must not even be received, in words."""
        expected_bytes = chunk.span.num_cells * self._bytes_per_cell
        if chunk.seq <= self._last_seq:
            return f"chunk {chunk.seq} came after chunk {self._last_seq}"
        if not 0 <= chunk.slot < self._num_slots or chunk.slot in [
            under_way.chunk.slot for under_way in self._under_way.values()
        ]:
            return f"chunk {chunk.seq}: slot {chunk.slot} of {self._num_slots} is not free"
        if chunk.num_bytes != expected_bytes or not 0 < chunk.num_bytes <= self._slot_bytes:
            return (
                f"chunk {chunk.seq}: {chunk.num_bytes} bytes, expected {expected_bytes}, at most"
                f" {self._slot_bytes}"
            )
        if transfer is None:
            return None
        if transfer.state is not InboundState.RECEIVING:
            return f"chunk {chunk.seq}: the transfer is {transfer.state.value}"
        try:
            transfer.announced(chunk.span)
        except ValueError as error:
            return f"chunk {chunk.seq}: {error}"
        return None

    def _on_chunk_progress(self, event: Arrived | Stored | Corrupt | StoreFailed) -> None:
        chunk, transfer = self._under_way[event.seq]
        if transfer is not None and transfer.state in (InboundState.FAILED, InboundState.RECEIVED):
            transfer = None  # it ended while its bytes were under way
        match event:
            case Arrived() if transfer is not None:
                self._out.append(Store(chunk, transfer.block_ids, transfer.mark))
                return
            case Corrupt():
                self._nack(chunk.transfer, event.error, FailureKind.CORRUPT)
                return
            case StoreFailed() if transfer is not None:
                self._fail(transfer, event.error, FailureKind.STORE)
            case Stored() if transfer is not None:
                transfer.num_unstored -= 1
        del self._under_way[event.seq]
        self._send(Ack(event.epoch, chunk.transfer, event.seq))
        if transfer is not None and transfer.is_complete:
            self._finish(transfer)

    def _on_commit(self, transfer: InboundTransfer, commit: Commit) -> None:
        if transfer.state is not InboundState.RECEIVING:
            self._nack(transfer.id, f"COMMIT came while the transfer is {transfer.state.value}")
        elif transfer.num_missing:
            self._nack(transfer.id, f"COMMIT came with {transfer.num_missing} (layer, token) cells missing")
        else:
            transfer.machine.transition(InboundState.COMMITTING)
            transfer.payload = commit.payload
            if transfer.is_complete:
                self._finish(transfer)

    def _on_tick(self) -> None:
        config = self._config
        for transfer in list(self._transfers.values()):
            if transfer.lease_ends_s(self._heard_s, config) < self._now_s:
                wanted = "an offer" if transfer.state is InboundState.EXPECTED else "a reservation"
                error = f"the lease ended after {self._now_s - transfer.since_s:.1f} s without {wanted}"
                self._fail(transfer, error, FailureKind.LOST)
        self._refused = {key: refused for key, refused in self._refused.items() if refused[1] > self._now_s}
        if self._link.state is not LinkState.UP:
            return
        if self._now_s - self._heard_s > config.dead_after_s:
            self._close_link(f"no sign of life for {config.dead_after_s} s", FailureKind.LOST)
        elif self._now_s - self._beat_s >= config.heartbeat_s:
            self._beat_s = self._now_s
            self._send(LinkHeartbeat(self._epoch or 0))

    # consequences

    def _send(
        self, message: Accept | Ack | Committed | Nack | AbortTransfer | LinkHeartbeat | LinkUnneeded
    ) -> None:
        self._out.append(Send(message))

    def _finish(self, transfer: InboundTransfer) -> None:
        self._end(transfer, InboundState.RECEIVED)
        self._counters.num_received += 1
        self._send(Committed(self._epoch or 0, transfer.id))
        self._out.append(ReceivedMessage(transfer.id, transfer.payload or b""))

    def _end(self, transfer: InboundTransfer, state: InboundState) -> None:
        transfer.machine.transition(state)
        del self._transfers[transfer.id]
        self._used_s = self._now_s

    def _report_failure(self, transfer: InboundTransfer, error: str, kind: FailureKind) -> None:
        if transfer.reservation is not None:
            self._counters.num_receive_failures += 1
            self._out.append(ReceiveFailed(transfer.id, error, kind))

    def _fail(self, transfer: InboundTransfer, error: str, kind: FailureKind) -> None:
        """Gives up: its chunks under way are received and dropped, the link stays."""
        if transfer.state is not InboundState.EXPECTED and self._link.state is LinkState.UP:
            self._send(AbortTransfer(self._epoch or 0, transfer.id, error, kind))
        self._end(transfer, InboundState.FAILED)
        self._report_failure(transfer, error, kind)

    def _nack(
        self, transfer_id: TransferId, error: str, kind: FailureKind = FailureKind.DISAGREEMENT
    ) -> None:
        """The peer violates the protocol, or the memory between us is corrupt: ends this link."""
        self._counters.num_nacks += 1
        self._send(Nack(self._epoch or 0, transfer_id, error, kind))
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.state is not InboundState.EXPECTED:
            self._end(transfer, InboundState.FAILED)
            self._report_failure(transfer, error, kind)
        self._close_link(f"the link was closed: {error}", kind)

    def _close_link(self, error: str, kind: FailureKind) -> None:
        if self._link.state is LinkState.UP:
            self._out.append(CloseLink(error))
            self._link_lost(error, kind)

    def _link_lost(self, error: str, kind: FailureKind) -> None:
        """Fails transfers that were under way; reservations wait for their source to reconnect, for the
        length of their lease."""
        self._link.transition(LinkState.DOWN)
        self._counters.num_links_closed += 1
        self._epoch = None
        self._under_way.clear()
        for transfer in list(self._transfers.values()):
            if transfer.state is not InboundState.EXPECTED:
                self._end(transfer, InboundState.FAILED)
                self._report_failure(transfer, error, kind)
