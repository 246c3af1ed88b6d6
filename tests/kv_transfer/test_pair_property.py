"""A sender and a receiver on a simulated wire: under any events, each transfer ends once on either side, the
received bytes are those that were sent, and no block is written after its transfer ended."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings, strategies as st

from pdserve.core.request import TransferId
from pdserve.kv_transfer.config import TransferConfig
from pdserve.kv_transfer.counters import TransferCounters
from pdserve.kv_transfer.events import (
    Arrived,
    CancelTransfer,
    CloseLink,
    CommitReady,
    Corrupt,
    Expect,
    Extend,
    LinkDown,
    LinkUp,
    OpenLink,
    OpenTransfer,
    PartComputed,
    PrefillDone,
    Receive,
    ReceivedMessage,
    ReceiveFailed,
    Send,
    SendChunk,
    SendFailed,
    Sent,
    Store,
    Stored,
    TransferTick,
)
from pdserve.kv_transfer.protocol import KVChunk
from pdserve.kv_transfer.receiver import TransferReceiver
from pdserve.kv_transfer.sender import TransferSender
from pdserve.kv_transfer.span import Span

from .support import layout

LAYOUT = layout(block_size=4, num_layers=2)
BYTES_PER_CELL = LAYOUT.bytes_per_token // LAYOUT.num_layers
SLOT_BYTES = 4 * BYTES_PER_CELL
CONFIG = TransferConfig(ring_slots=2, lease_s=10.0, max_lease_s=20.0)
Cell = tuple[int, int]


@dataclass
class Transfer:
    """The two workers' knowledge of one transfer. P's KV of a cell is (transfer, layer, token)."""

    id: TransferId
    num_tokens: int
    num_cached: int
    steps: deque[Any]  # reports that P's worker has yet to make
    cells: dict[Cell, tuple[TransferId, int, int]] = field(default_factory=dict)  # D's blocks
    sent: list[object] = field(default_factory=list)
    received: list[object] = field(default_factory=list)
    is_expected: bool = False
    is_sent: bool = False


class World:
    """Both machines and the wire between them. Every choice is drawn, time moves only on request."""

    def __init__(self, transfers: list[Transfer]) -> None:
        self.transfers = {transfer.id: transfer for transfer in transfers}
        self.counters = TransferCounters()
        self.sender = TransferSender(LAYOUT, CONFIG, TransferCounters(), "d")
        self.receiver = TransferReceiver(LAYOUT, CONFIG, self.counters, "p")
        self.now_s = 0.0
        self.epoch = 0
        self.dialling = False
        self.to_receiver: deque[Any] = deque()
        self.to_sender: deque[Any] = deque()
        self.late: list[Any] = []  # messages of links that are gone, to be delivered at any time
        self.arriving: list[KVChunk] = []
        self.ring: dict[int, tuple[KVChunk, dict[Cell, tuple[TransferId, int, int]]]] = {}

    def feed_sender(self, event: Any) -> None:
        for command in self.sender.handle(event, self.now_s):
            match command:
                case OpenLink():
                    self.dialling = True
                case CloseLink():
                    self.break_link()
                case Send():
                    self.to_receiver.append(command.message)
                case SendChunk():
                    assert not self.transfers[command.transfer].sent, "gathered from blocks that may be freed"
                    cells = cells_of(command.span)
                    self.to_receiver.append(
                        KVChunk(
                            self.epoch,
                            command.transfer,
                            command.seq,
                            command.slot,
                            command.span,
                            command.num_bytes,
                            0,
                        )
                    )
                    self.ring[command.slot] = (
                        self.to_receiver[-1],
                        {cell: (command.transfer, *cell) for cell in cells},
                    )
                case Sent():
                    self.transfers[command.transfer].sent.append(command.stats)
                case SendFailed():
                    self.transfers[command.transfer].sent.append(command.error)

    def feed_receiver(self, event: Any) -> None:
        events = deque([event])
        while events:
            for command in self.receiver.handle(events.popleft(), self.now_s):
                match command:
                    case CloseLink():
                        self.break_link()
                    case Send():
                        self.to_sender.append(command.message)
                    case Receive():
                        self.arriving.append(command.chunk)
                    case Store():
                        events.append(self.store(command))
                    case ReceivedMessage():
                        self.transfers[command.transfer].received.append(command.payload)
                    case ReceiveFailed():
                        self.transfers[command.transfer].received.append(command.error)

    def store(self, command: Store) -> Stored | Corrupt:
        chunk = command.chunk
        announced, cells = self.ring[chunk.slot]
        assert announced is chunk, "the slot was reused before its chunk was acknowledged"
        transfer = self.transfers[chunk.transfer]
        assert not transfer.received, "written after its end"
        assert transfer.is_expected
        assert not transfer.cells.keys() & cells.keys(), "written twice"
        transfer.cells.update(cells)
        return Stored(chunk.epoch, chunk.seq)

    def link_up(self) -> None:
        self.epoch += 1
        self.dialling = False
        self.feed_receiver(LinkUp(self.epoch, "shm", CONFIG.ring_slots, SLOT_BYTES))
        self.feed_sender(LinkUp(self.epoch, "shm", CONFIG.ring_slots, SLOT_BYTES))

    def break_link(self) -> None:
        """Messages that were under way may still arrive, long after."""
        self.dialling = False
        self.late += [("receiver", m) for m in self.to_receiver] + [("sender", m) for m in self.to_sender]
        self.late += [("receiver", Arrived(chunk.epoch, chunk.seq)) for chunk in self.arriving]
        self.to_receiver.clear()
        self.to_sender.clear()
        self.arriving.clear()
        self.ring.clear()

    def act(self, draw: Any) -> None:
        """Performs one random action."""
        transfer = draw(st.sampled_from(list(self.transfers.values())))
        action = draw(st.integers(0, 19))
        if action <= 5 and self.to_receiver:
            self.feed_receiver(self.to_receiver.popleft())
        elif action <= 8 and self.to_sender:
            self.feed_sender(self.to_sender.popleft())
        elif action <= 10 and self.arriving:
            chunk = self.arriving.pop(draw(st.integers(0, len(self.arriving) - 1)))
            self.feed_receiver(Arrived(chunk.epoch, chunk.seq))
        elif action == 11 and self.dialling:
            self.link_up()
        elif action <= 14 and transfer.steps:
            transfer.is_sent = True
            self.feed_sender(transfer.steps.popleft())
        elif action == 15 and not transfer.is_expected:
            self.expect(transfer)
        elif action == 16:
            self.rare(draw, transfer)
        else:
            self.now_s += draw(st.sampled_from([0.0, 0.1, 0.6]))
            self.feed_sender(TransferTick())
            self.feed_receiver(TransferTick())

    def rare(self, draw: Any, transfer: Transfer) -> None:
        kind = draw(st.integers(0, 5))
        if kind == 0:
            self.feed_sender(CancelTransfer(transfer.id, "cancelled"))
        elif kind == 1:
            self.feed_receiver(CancelTransfer(transfer.id, "cancelled"))
        elif (
            kind == 2 and self.epoch and not self.dialling
        ):  # a link that is being dialled ends by its own result
            epoch = self.epoch
            self.break_link()
            self.feed_sender(LinkDown(epoch, "lost"))
            self.feed_receiver(LinkDown(epoch, "lost"))
        elif kind == 3 and self.dialling:
            self.dialling = False
            self.feed_sender(LinkDown(None, "refused"))
        elif kind == 4:
            self.now_s += 4.0
        elif self.late:
            side, message = draw(st.sampled_from(self.late))
            (self.feed_receiver if side == "receiver" else self.feed_sender)(message)

    def expect(self, transfer: Transfer) -> None:
        transfer.is_expected = True
        num_blocks = -(-transfer.num_tokens // LAYOUT.block_size)
        self.feed_receiver(
            Expect(transfer.id, tuple(range(num_blocks)), transfer.num_tokens, transfer.num_cached)
        )

    def settle(self) -> None:
        """Runs without further faults: everything is sent, delivered, and time passes until all has ended."""
        for transfer in self.transfers.values():
            if not transfer.is_expected:
                self.expect(transfer)
        for _ in range(200):
            for transfer in self.transfers.values():
                while transfer.steps:
                    transfer.is_sent = True
                    self.feed_sender(transfer.steps.popleft())
            if self.dialling:
                self.link_up()
            while self.to_receiver or self.to_sender or self.arriving:
                if self.to_receiver:
                    self.feed_receiver(self.to_receiver.popleft())
                if self.arriving:
                    chunk = self.arriving.pop(0)
                    self.feed_receiver(Arrived(chunk.epoch, chunk.seq))
                if self.to_sender:
                    self.feed_sender(self.to_sender.popleft())
            self.now_s += 0.2
            self.feed_sender(TransferTick())
            self.feed_receiver(TransferTick())


def cells_of(span: Span) -> list[Cell]:
    return [
        (i, t)
        for i in range(span.layer_start, span.layer_end)
        for t in range(span.token_start, span.token_end)
    ]


@st.composite
def transfers(draw: st.DrawFn) -> list[Transfer]:
    made = []
    for number in range(draw(st.integers(1, 3))):
        transfer_id = TransferId("r", number)
        num_tokens = draw(st.integers(1, 14))
        steps: deque[Any] = deque(
            [OpenTransfer(transfer_id, (0, 1), num_tokens), Extend(transfer_id, (2, 3))]
        )
        cut = draw(st.integers(0, num_tokens))
        for start, end in ((0, cut), (cut, num_tokens)):
            if start < end:
                steps += [
                    PartComputed(transfer_id, Span(i, i + 1, start, end)) for i in range(LAYOUT.num_layers)
                ]
        steps += [PrefillDone(transfer_id), CommitReady(transfer_id, b"first")]
        made.append(Transfer(transfer_id, num_tokens, draw(st.integers(0, num_tokens)), steps))
    return made


def check(transfer: Transfer) -> None:
    assert len(transfer.sent) == 1, transfer.sent
    assert len(transfer.received) == 1, transfer.received
    if transfer.received == [b"first"]:
        wanted = cells_of(Span(0, LAYOUT.num_layers, transfer.num_cached, transfer.num_tokens))
        assert transfer.cells == {cell: (transfer.id, *cell) for cell in wanted}
    if not isinstance(transfer.sent[0], str):
        assert transfer.received == [b"first"], "COMMITTED without having received"


@settings(max_examples=150, deadline=None)
@given(transfers(), st.data())
def test_each_transfer_ends_once_and_received_bytes_are_those_sent(
    made: list[Transfer], data: st.DataObject
) -> None:
    world = World(made)
    for _ in range(data.draw(st.integers(0, 60))):
        world.act(data.draw)
    world.settle()
    for transfer in made:
        check(transfer)
    assert world.counters.num_nacks == 0, "both sides keep to the protocol, whatever is lost"


@settings(max_examples=50, deadline=None)
@given(transfers())
def test_without_faults_everything_is_received(made: list[Transfer]) -> None:
    world = World(made)
    world.settle()
    for transfer in made:
        check(transfer)
        assert transfer.received == [b"first"]
        assert not isinstance(transfer.sent[0], str)
