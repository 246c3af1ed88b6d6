"""P's half of a pair, without I/O: offers, readiness, credits and acknowledgements come in; chunks and
endings go out.

Open -> OFFER -> ACCEPT -> CHUNK... (while later layers and tokens are still computed) -> COMMIT -> COMMITTED
-> Sent"""

from typing import NamedTuple

from ..core.automaton import Automaton
from ..core.failures import FailureKind
from ..core.messages import KVLayout
from ..core.request import TransferId
from .config import TransferConfig
from .counters import TransferCounters
from .events import (
    CancelTransfer,
    CloseLink,
    CommitReady,
    Extend,
    GatherFailed,
    LinkDown,
    LinkUp,
    OpenLink,
    OpenTransfer,
    PartComputed,
    PeerGone,
    PrefillDone,
    ReleaseLink,
    Send,
    SendChunk,
    SenderCommand,
    SenderEvent,
    SendFailed,
    Sent,
    TransferTick,
)
from .idle_links import LinkUse
from .outbound_transfer import OutboundTransfer
from .protocol import (
    AbortTransfer,
    Accept,
    Ack,
    Commit,
    Committed,
    LinkHeartbeat,
    LinkUnneeded,
    Nack,
    OfferTransfer,
)
from .span import Span
from .states import LINK_TRANSITIONS, LinkState, OutboundState


class _InFlight(NamedTuple):
    transfer: OutboundTransfer
    slot: int
    num_bytes: int
    sent_s: float


class TransferSender:
    """All transfers to one peer. Slots of the peer's ring are shared by them, the oldest transfer first."""

    def __init__(
        self, layout: KVLayout, config: TransferConfig, counters: TransferCounters, peer: str
    ) -> None:
        self._layout = layout
        self._bytes_per_cell = layout.wire_bytes_per_cell
        self._config = config
        self._counters = counters
        self._link = Automaton(LINK_TRANSITIONS, LinkState.DOWN, name=f"link to {peer}")
        self._epoch: int | None = None
        self._link_name = ""
        self._slot_bytes = 0
        self._next_seq = 0
        self._free_slots: list[int] = []
        self._in_flight: dict[int, _InFlight] = {}  # by seq, oldest first
        self._transfers: dict[TransferId, OutboundTransfer] = {}  # oldest first
        self._now_s = 0.0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._used_s = 0.0
        self._out: list[SenderCommand] = []

    @property
    def is_idle(self) -> bool:
        """Whether this object holds no state that would be lost with it."""
        return self._link.state is LinkState.DOWN and not self._transfers

    @property
    def use(self) -> LinkUse | None:
        """The use of the link; None while there is none."""
        if self._link.state is LinkState.DOWN:
            return None
        return LinkUse(self._used_s, not self._is_link_unused)

    @property
    def _is_link_unused(self) -> bool:
        return self._link.state is LinkState.UP and not self._transfers and not self._in_flight

    def handle(self, event: SenderEvent, now_s: float) -> list[SenderCommand]:
        """Returns the commands that answer `event`, in order."""
        self._now_s = now_s
        self._out = []
        match event:
            case Accept() | Ack() | Committed() | Nack() | AbortTransfer() | LinkHeartbeat() | LinkUnneeded():
                self._on_message(event)
            case OpenTransfer():
                self._on_open(event)
            case Extend() | PartComputed() | PrefillDone() | CommitReady() | CancelTransfer():
                transfer = self._transfers.get(event.transfer)
                if transfer is not None:
                    self._on_worker(transfer, event)
            case GatherFailed():
                self._on_gather_failed(event)
            case LinkUp():
                self._on_link_up(event)
            case LinkDown():
                if event.epoch == self._epoch and self._link.state is not LinkState.DOWN:
                    self._link_lost(event.error)
            case ReleaseLink():
                self._release_link()
            case PeerGone():
                self._close_link(event.error)
            case TransferTick():
                self._on_tick()
        self._pump()
        return self._out

    # from the worker

    def _on_open(self, event: OpenTransfer) -> None:
        assert event.transfer not in self._transfers, f"{event.transfer} is being sent already"
        transfer = self._transfers[event.transfer] = OutboundTransfer(event, self._layout, self._now_s)
        if self._link.state is LinkState.UP:
            self._offer(transfer)
        elif self._link.state is LinkState.DOWN:
            self._link.transition(LinkState.CONNECTING)
            self._out.append(OpenLink())

    def _on_worker(
        self,
        transfer: OutboundTransfer,
        event: Extend | PartComputed | PrefillDone | CommitReady | CancelTransfer,
    ) -> None:
        match event:
            case PartComputed():
                try:
                    transfer.computed(event.span, event.mark)
                except ValueError as error:
                    self._fail(transfer, str(error), FailureKind.DISAGREEMENT)
            case Extend():
                transfer.block_ids.extend(event.block_ids)
            case PrefillDone():
                transfer.prefill_done(self._now_s)
            case CommitReady():
                transfer.prefill_done(self._now_s)
                transfer.payload = event.payload
            case CancelTransfer():
                self._fail(transfer, event.error, event.kind)

    def _on_gather_failed(self, event: GatherFailed) -> None:
        if event.epoch != self._epoch:
            return
        lost = self._in_flight.pop(event.seq)
        self._free_slots.append(lost.slot)
        if event.transfer in self._transfers:
            self._fail(lost.transfer, event.error, FailureKind.STORE)

    # from the link and the peer

    def _on_link_up(self, event: LinkUp) -> None:
        self._link.transition(LinkState.UP)
        self._epoch = event.epoch
        self._link_name, self._slot_bytes = event.link, event.slot_bytes
        self._next_seq = 0
        self._free_slots = list(range(event.num_slots))
        self._heard_s = self._beat_s = self._used_s = self._now_s
        self._counters.num_links_opened += 1
        for transfer in self._transfers.values():
            self._offer(transfer)

    def _on_message(
        self, message: Accept | Ack | Committed | Nack | AbortTransfer | LinkHeartbeat | LinkUnneeded
    ) -> None:
        if message.epoch != self._epoch:
            self._counters.num_stale_messages += 1
            return
        self._heard_s = self._now_s
        if isinstance(message, LinkHeartbeat):
            return
        if isinstance(message, LinkUnneeded):
            self._release_link()
            return
        if isinstance(message, Ack):
            self._on_ack(message)
            return
        if isinstance(message, Nack):
            self._on_nack(message)
            return
        transfer = self._transfers.get(message.transfer)
        if transfer is None:
            self._counters.num_stale_messages += 1
            return
        match message:
            case Accept() if transfer.state is OutboundState.OFFERED:
                self._on_accept(transfer, message)
            case Committed() if transfer.state is OutboundState.COMMITTING:
                self._on_committed(transfer)
            case AbortTransfer():
                self._end(transfer, OutboundState.FAILED)
                self._out.append(SendFailed(transfer.id, message.error, message.kind))
            case _:
                self._counters.num_stale_messages += 1

    def _on_nack(self, message: Nack) -> None:
        """The receiver closes the link behind it: closed here as well, so that no later transfer is offered
        on it."""
        transfer = self._transfers.get(message.transfer)
        error = f"refused by the receiver: {message.error}"
        self._counters.num_nacks += 1
        if transfer is not None:
            self._end(transfer, OutboundState.FAILED)
            self._out.append(SendFailed(transfer.id, error, message.kind))
        self._close_link(error)

    def _on_ack(self, message: Ack) -> None:
        acked = self._in_flight.pop(message.seq, None)
        if acked is None:
            self._counters.num_stale_messages += 1
            return
        self._free_slots.append(acked.slot)
        acked.transfer.chunk_acked(acked.num_bytes)

    def _on_accept(self, transfer: OutboundTransfer, message: Accept) -> None:
        transfer.machine.transition(OutboundState.SENDING)
        try:
            transfer.accept(message.token_start, message.credits, self._link_name, self._slot_bytes)
        except ValueError as error:
            self._fail(transfer, str(error), FailureKind.DISAGREEMENT)

    def _on_committed(self, transfer: OutboundTransfer) -> None:
        self._end(transfer, OutboundState.SENT)
        self._counters.num_sent += 1
        self._out.append(Sent(transfer.id, transfer.stats(self._now_s)))

    def _on_tick(self) -> None:
        if self._link.state is not LinkState.UP:
            return
        error = self._overdue()
        if error is not None:
            self._close_link(error)
        elif self._now_s - self._beat_s >= self._config.heartbeat_s:
            self._beat_s = self._now_s
            self._send(LinkHeartbeat(self._epoch or 0))

    def _overdue(self) -> str | None:
        config = self._config
        if self._now_s - self._heard_s > config.dead_after_s:
            return f"no sign of life for {config.dead_after_s} s"
        for seq, chunk in self._in_flight.items():
            if self._now_s - chunk.sent_s > config.chunk_timeout_s:
                return f"chunk {seq} was not acknowledged within {config.chunk_timeout_s} s"
            break
        for transfer in list(self._transfers.values()):
            waited_s = self._now_s - transfer.waiting_since_s
            if transfer.state is OutboundState.COMMITTING and waited_s > config.chunk_timeout_s:
                return f"{transfer.id} was not committed within {config.chunk_timeout_s} s"
            limit_s = config.max_lease_s + config.chunk_timeout_s
            if transfer.state is OutboundState.OFFERED and waited_s > limit_s:
                self._fail(transfer, f"the offer was not answered within {limit_s} s", FailureKind.LOST)
        return None

    # consequences

    def _offer(self, transfer: OutboundTransfer) -> None:
        transfer.machine.transition(OutboundState.OFFERED)
        transfer.waiting_since_s = self._now_s
        self._send(OfferTransfer(self._epoch or 0, transfer.id, transfer.num_tokens))

    def _pump(self) -> None:
        """Sends ready chunks while slots are free, and commits transfers that are complete."""
        for transfer in list(self._transfers.values()):
            if transfer.state is not OutboundState.SENDING:
                continue
            while self._free_slots and (ready := transfer.next_chunk()) is not None:
                self._send_chunk(transfer, *ready)
            if transfer.is_announced:
                self._commit(transfer)

    def _send_chunk(self, transfer: OutboundTransfer, span: Span, mark: int) -> None:
        num_bytes = span.num_cells * self._bytes_per_cell
        slot, seq = self._free_slots.pop(), self._next_seq
        self._next_seq += 1
        self._in_flight[seq] = _InFlight(transfer, slot, num_bytes, self._now_s)
        transfer.chunk_sent(num_bytes, self._now_s)
        self._out.append(SendChunk(transfer.id, seq, slot, span, num_bytes, transfer.block_ids, mark))

    def _commit(self, transfer: OutboundTransfer) -> None:
        if transfer.num_missing:
            error = f"committed with {transfer.num_missing} (layer, token) cells not computed"
            self._fail(transfer, error, FailureKind.DISAGREEMENT)
            return
        transfer.machine.transition(OutboundState.COMMITTING)
        transfer.waiting_since_s = self._now_s
        self._send(Commit(self._epoch or 0, transfer.id, transfer.payload or b""))

    def _send(self, message: OfferTransfer | Commit | AbortTransfer | LinkHeartbeat) -> None:
        self._out.append(Send(message))

    def _end(self, transfer: OutboundTransfer, state: OutboundState) -> None:
        transfer.machine.transition(state)
        del self._transfers[transfer.id]
        self._used_s = self._now_s
        if state is OutboundState.FAILED:
            self._counters.num_send_failures += 1

    def _fail(self, transfer: OutboundTransfer, error: str, kind: FailureKind) -> None:
        """Gives up: chunks under way are freed by their ACK, no other chunk of it leaves, the link stays."""
        if transfer.state is not OutboundState.WAITING and self._link.state is LinkState.UP:
            self._send(AbortTransfer(self._epoch or 0, transfer.id, error, kind))
        self._end(transfer, OutboundState.FAILED)
        self._out.append(SendFailed(transfer.id, error, kind))

    def _release_link(self) -> None:
        if self._is_link_unused:
            self._close_link("unused")

    def _close_link(self, error: str) -> None:
        self._out.append(CloseLink(error))
        self._link_lost(error)

    def _link_lost(self, error: str) -> None:
        if self._link.state is LinkState.UP:
            self._counters.num_links_closed += 1
        if self._link.state is not LinkState.DOWN:
            self._link.transition(LinkState.DOWN)
        self._epoch = None
        self._in_flight.clear()
        self._free_slots.clear()
        for transfer in list(self._transfers.values()):
            self._end(transfer, OutboundState.FAILED)
            self._out.append(SendFailed(transfer.id, error, FailureKind.LOST))
