"""The sender and the receiver by example: credits, deadlines, leases, heartbeats, and transitions that do not
exist."""

import pytest

from pdserve.core.automaton import Automaton
from pdserve.core.errors import InvalidTransition
from pdserve.core.failures import FailureKind
from pdserve.core.messages import KVLayout
from pdserve.core.request import TransferId
from pdserve.kv_transfer.config import TransferConfig
from pdserve.kv_transfer.counters import TransferCounters
from pdserve.kv_transfer.events import (
    CancelTransfer,
    CloseLink,
    CommitReady,
    Expect,
    LinkDown,
    LinkUp,
    OpenLink,
    OpenTransfer,
    PartComputed,
    PrefillDone,
    Receive,
    ReceiveFailed,
    ReleaseLink,
    Send,
    SendChunk,
    SendFailed,
    Sent,
    TransferTick,
)
from pdserve.kv_transfer.idle_links import LinkUse
from pdserve.kv_transfer.outbound_transfer import OutboundTransfer
from pdserve.kv_transfer.protocol import (
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
from pdserve.kv_transfer.receiver import TransferReceiver
from pdserve.kv_transfer.sender import TransferSender
from pdserve.kv_transfer.span import Span
from pdserve.kv_transfer.states import OUTBOUND_TRANSITIONS, OutboundState

from .support import layout

LAYOUT = layout(num_layers=2)
CELL_BYTES = LAYOUT.bytes_per_token // LAYOUT.num_layers
SLOT_BYTES = 8 * CELL_BYTES
CONFIG = TransferConfig(ring_slots=3)
T = TransferId("request", 0)


def open_sender(num_tokens: int = 64) -> TransferSender:
    """A link of 3 slots, and an offered transfer."""
    sender = TransferSender(LAYOUT, CONFIG, TransferCounters(), "d")
    assert sender.handle(OpenTransfer(T, tuple(range(8)), num_tokens), 0.0) == [OpenLink()]
    assert sender.handle(LinkUp(1, "shm", 3, SLOT_BYTES), 0.0) == [Send(OfferTransfer(1, T, num_tokens))]
    return sender


def open_receiver() -> TransferReceiver:
    receiver = TransferReceiver(LAYOUT, CONFIG, TransferCounters(), "p")
    receiver.handle(LinkUp(1, "shm", 3, SLOT_BYTES), 0.0)
    return receiver


def chunks(commands: list[object]) -> list[int]:
    return [command.seq for command in commands if isinstance(command, SendChunk)]


def test_at_most_as_many_chunks_as_slots_are_under_way_until_acked() -> None:
    sender = open_sender()
    sender.handle(PartComputed(T, Span(0, 2, 0, 64)), 0.0)
    commands = sender.handle(Accept(1, T, 0, 3), 0.0)
    assert chunks(list(commands)) == [0, 1, 2]
    assert {c.slot for c in commands if isinstance(c, SendChunk)} == {0, 1, 2}
    (again,) = sender.handle(Ack(1, T, 1), 0.0)
    assert isinstance(again, SendChunk)
    assert again.seq == 3
    assert again.slot == next(c.slot for c in commands if isinstance(c, SendChunk) and c.seq == 1)
    assert sender.handle(Ack(1, T, 1), 0.0) == []


def test_a_transfer_stays_within_its_credits() -> None:
    sender = open_sender()
    sender.handle(PartComputed(T, Span(0, 2, 0, 64)), 0.0)
    assert chunks(list(sender.handle(Accept(1, T, 0, 1), 0.0))) == [0]


def test_a_small_transfer_leaves_in_eighths_so_that_most_is_hidden() -> None:
    large = KVLayout(
        num_layers=16, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=32, model_fingerprint="m"
    )
    transfer = OutboundTransfer(OpenTransfer(T, (0, 1), 64), large, 0.0)
    transfer.accept(0, 100, "shm", 2 << 20)
    for layer in range(16):
        transfer.computed(Span(layer, layer + 1, 0, 64), mark=layer)
        assert transfer.next_chunk() == ((Span(layer - 1, layer + 1, 0, 64), layer) if layer % 2 else None)


def test_the_figures_distinguish_hidden_from_exposed() -> None:
    sender = open_sender(num_tokens=8)
    sender.handle(Accept(1, T, 0, 3), 0.0)
    sender.handle(PartComputed(T, Span(0, 1, 0, 8)), 1.0)
    sender.handle(Ack(1, T, 0), 2.0)
    sender.handle(PrefillDone(T), 3.0)
    sender.handle(PartComputed(T, Span(1, 2, 0, 8)), 3.0)
    assert sender.handle(CommitReady(T, b"x"), 3.0) == [Send(Commit(1, T, b"x"))]
    (sent,) = sender.handle(Committed(1, T), 4.5)
    assert isinstance(sent, Sent)
    assert (sent.stats.num_bytes, sent.stats.hidden_bytes) == (16 * CELL_BYTES, 8 * CELL_BYTES)
    assert (sent.stats.duration_s, sent.stats.exposed_s) == (3.5, 1.5)


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (
            [Accept(1, T, 0, 3), PartComputed(T, Span(0, 2, 0, 64))],
            "chunk 0 was not acknowledged within 5.0 s",
        ),
        ([Accept(1, T, 64, 3), CommitReady(T, b"")], "was not committed within 5.0 s"),
    ],
)
def test_a_slow_receiver_loses_the_link(
    prepare: list[Accept | PartComputed | CommitReady], error: str
) -> None:
    sender = open_sender()
    for event in prepare:
        sender.handle(event, 0.0)
    for tenth in range(0, 50):
        sender.handle(LinkHeartbeat(1), tenth / 10)
        assert not any(isinstance(c, CloseLink) for c in sender.handle(TransferTick(), tenth / 10))
    sender.handle(LinkHeartbeat(1), 5.1)
    close, failed = sender.handle(TransferTick(), 5.1)
    assert isinstance(close, CloseLink)
    assert isinstance(failed, SendFailed)
    assert error in failed.error
    assert sender.is_idle


def test_silence_ends_the_link_on_both_sides_after_heartbeats() -> None:
    sender, receiver = open_sender(), open_receiver()
    receiver.handle(Expect(T, (0,), 8, 0), 0.0)
    receiver.handle(OfferTransfer(1, T, 8), 0.0)
    for machine in (sender, receiver):
        assert machine.handle(TransferTick(), 0.6) == [Send(LinkHeartbeat(1))]
        assert machine.handle(TransferTick(), 0.7) == []
        close, failed = machine.handle(TransferTick(), 3.1)
        assert close == CloseLink("no sign of life for 3.0 s")
        assert isinstance(failed, (SendFailed, ReceiveFailed))


@pytest.mark.parametrize("has_offer", [True, False])
def test_a_live_peer_may_take_minutes_to_match_offer_and_reservation(has_offer: bool) -> None:
    sender, receiver = open_sender(), open_receiver()
    receiver.handle(OfferTransfer(1, T, 8) if has_offer else Expect(T, (0,), 8, 0), 0.0)
    for second in range(600):
        for machine in (sender, receiver):
            machine.handle(LinkHeartbeat(1), float(second))
            machine.handle(TransferTick(), float(second))
    receiver.handle(LinkHeartbeat(1), 600.5)
    assert receiver.handle(Expect(T, (0,), 8, 0) if has_offer else OfferTransfer(1, T, 8), 600.5) == [
        Send(Accept(1, T, 0, 3))
    ]
    assert isinstance(sender.handle(Accept(1, T, 0, 3), 600.5), list)
    assert not sender.is_idle


def test_even_a_live_peer_is_not_awaited_indefinitely() -> None:
    sender, receiver = open_sender(), open_receiver()
    receiver.handle(OfferTransfer(1, T, 8), 0.0)
    for machine in (sender, receiver):
        machine.handle(LinkHeartbeat(1), 606.0)
    abort, beat = receiver.handle(TransferTick(), 606.0)
    assert abort == Send(
        AbortTransfer(1, T, "the lease ended after 606.0 s without a reservation", FailureKind.LOST)
    )
    assert beat == Send(LinkHeartbeat(1))
    assert SendFailed(T, "the offer was not answered within 605.0 s", FailureKind.LOST) in sender.handle(
        TransferTick(), 606.0
    )


def test_a_reservation_outlives_its_link_by_one_lease() -> None:
    receiver = open_receiver()
    receiver.handle(Expect(T, (0,), 8, 0), 0.0)
    receiver.handle(LinkHeartbeat(1), 100.0)
    receiver.handle(LinkDown(1, "reset"), 101.0)
    assert receiver.handle(TransferTick(), 129.0) == []
    (failed,) = receiver.handle(TransferTick(), 131.0)
    assert failed == ReceiveFailed(T, "the lease ended after 131.0 s without an offer", FailureKind.LOST)


def test_a_refused_chunk_fails_its_transfer_and_closes_the_link() -> None:
    sender = open_sender()
    error = "refused by the receiver: wrong size"
    assert sender.handle(Nack(1, T, "wrong size", FailureKind.DISAGREEMENT), 0.0) == [
        SendFailed(T, error, FailureKind.DISAGREEMENT),
        CloseLink(error),
    ]


def test_a_transfer_after_a_refused_chunk_is_offered_on_a_new_link() -> None:
    sender, later = open_sender(), TransferId("later", 0)
    sender.handle(Nack(1, T, "wrong size", FailureKind.DISAGREEMENT), 0.0)
    assert sender.handle(OpenTransfer(later, (0,), 8), 0.0) == [OpenLink()]
    assert sender.handle(LinkUp(2, "shm", 3, SLOT_BYTES), 0.0) == [Send(OfferTransfer(2, later, 8))]


def test_late_messages_about_an_ended_transfer_are_ignored() -> None:
    sender = open_sender()
    why = "cancelled", FailureKind.CANCELLED
    assert sender.handle(CancelTransfer(T, "cancelled"), 0.0) == [
        Send(AbortTransfer(1, T, *why)),
        SendFailed(T, *why),
    ]
    for message in (
        Accept(1, T, 0, 3),
        Committed(1, T),
        AbortTransfer(1, T, *why),
        Accept(7, T, 0, 3),
    ):
        assert sender.handle(message, 0.0) == []


def test_an_offer_of_an_unexpected_length_is_aborted() -> None:
    receiver = open_receiver()
    receiver.handle(Expect(T, (0, 1), 9, 0), 0.0)
    why = "8 tokens were offered, 9 are expected", FailureKind.DISAGREEMENT
    assert receiver.handle(OfferTransfer(1, T, 8), 0.0) == [
        Send(AbortTransfer(1, T, *why)),
        ReceiveFailed(T, *why),
    ]


def test_chunks_of_a_cancelled_transfer_are_received_and_dropped() -> None:
    receiver = open_receiver()
    receiver.handle(Expect(T, (0,), 8, 0), 0.0)
    receiver.handle(OfferTransfer(1, T, 8), 0.0)
    receiver.handle(CancelTransfer(T, "cancelled"), 0.0)
    chunk = KVChunk(1, T, 0, 0, Span(0, 1, 0, 8), 8 * CELL_BYTES, 0)
    assert receiver.handle(chunk, 0.0) == [Receive(chunk)]


def test_an_illegal_transition_is_a_bug_and_reports_its_history() -> None:
    machine = Automaton(OUTBOUND_TRANSITIONS, OutboundState.WAITING, name="outbound x")
    machine.transition(OutboundState.OFFERED)
    with pytest.raises(InvalidTransition, match=r"outbound x.*COMMITTING.*'waiting', 'offered'"):
        machine.transition(OutboundState.COMMITTING)
    assert machine.state is OutboundState.OFFERED


def test_a_link_closes_on_request_of_either_end_only_without_a_transfer() -> None:
    sender = open_sender(num_tokens=8)
    assert sender.use == LinkUse(0.0, is_busy=True)
    assert sender.handle(ReleaseLink(), 1.0) == []
    assert sender.handle(LinkUnneeded(1), 1.0) == []
    sender.handle(CancelTransfer(T, "cancelled"), 2.0)
    assert sender.use == LinkUse(2.0, is_busy=False)
    assert sender.handle(LinkUnneeded(0), 3.0) == [], "an older link's"
    assert sender.handle(LinkUnneeded(1), 3.0) == [CloseLink("unused")]
    assert sender.use is None and sender.is_idle


def test_a_link_is_not_unused_while_a_chunk_of_an_ended_transfer_is_under_way() -> None:
    sender = open_sender(num_tokens=8)
    sender.handle(PartComputed(T, Span(0, 2, 0, 8)), 0.0)
    sender.handle(Accept(1, T, 0, 1), 0.0)
    sender.handle(CancelTransfer(T, "cancelled"), 1.0)
    assert sender.handle(ReleaseLink(), 1.0) == []
    sender.handle(Ack(1, T, 0), 1.0)
    assert sender.handle(ReleaseLink(), 1.0) == [CloseLink("unused")]


def test_a_receiver_asks_for_the_end_of_a_link_and_counts_reservations_as_use() -> None:
    receiver = open_receiver()
    assert receiver.use == LinkUse(0.0, is_busy=False)
    assert receiver.handle(ReleaseLink(), 1.0) == [Send(LinkUnneeded(1))]
    receiver.handle(Expect(T, (0,), 8, 0), 2.0)
    assert receiver.use == LinkUse(0.0, is_busy=True)
    receiver.handle(LinkDown(1, "closed"), 2.0)
    assert receiver.use is None and not receiver.is_idle
