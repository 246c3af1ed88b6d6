"""The shells of a pair: a link that breaks during an operation, and connections that are prepared
concurrently."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from pdserve.core.messages import TransferAddress
from pdserve.core.request import TransferId
from pdserve.kv_transfer.acceptor import TransferAcceptor
from pdserve.kv_transfer.choice import Place
from pdserve.kv_transfer.config import Membership, TransferConfig
from pdserve.kv_transfer.events import CommitReady, Expect, OpenTransfer, PartComputed
from pdserve.kv_transfer.hub import TransferHub
from pdserve.kv_transfer.inbound import InboundPair
from pdserve.kv_transfer.link import Link, PeerLost
from pdserve.kv_transfer.link_maker import LinkMaker
from pdserve.kv_transfer.outbound import OutboundPair
from pdserve.kv_transfer.pair import Identity, Local
from pdserve.kv_transfer.protocol import (
    PROTOCOL_VERSION,
    Accept,
    Connect,
    KVChunk,
    OfferTransfer,
    SenderMessage,
)
from pdserve.kv_transfer.span import Span

from .support import ArrayStore, Recorder, layout

T = TransferId("request", 0)
WHOLE = Span(0, 3, 0, 8)
NUM_BYTES = 8 * layout().bytes_per_token


class WireStub:
    """A control stream that records the messages sent."""

    def __init__(self) -> None:
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_lost: Callable[[str], None] = lambda _: None
        self.said: list[object] = []
        self.is_open = True

    def send(self, message: object, fd: int | None = None) -> None:
        self.said.append(message)

    def close(self) -> None:
        self.is_open = False


class BrokenLink:
    """Each operation finds the connection broken."""

    name: ClassVar[str] = "gloo"
    executor = None
    takes_turns = False
    num_slots, slot_bytes = 1, NUM_BYTES
    is_gone = False

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def send(self, slot: int, num_bytes: int, seq: int) -> None:
        raise PeerLost("the connection broke")

    def recv(self, slot: int, num_bytes: int, seq: int) -> None:
        raise PeerLost("the connection broke")

    def wait(self, ticket: Any, timeout_s: float) -> None:
        raise AssertionError("there is no ticket")

    def kill(self) -> None:
        self.is_gone = True

    def join(self) -> None: ...


def local(clock: Callable[[], float] = lambda: 0.0) -> tuple[Local, Recorder]:
    store = ArrayStore(layout(), 4, seed=1)
    ends = Recorder(store)
    made = Local(
        Identity("d", 1, Place("here", "")),
        store,
        ends,
        TransferConfig(chunk_bytes=NUM_BYTES),
        clock=clock,
    )
    return made, ends


def test_a_link_that_breaks_during_a_receive_fails_its_transfer_at_once() -> None:
    here, ends = local()
    pair, wire, link = InboundPair(here, "p"), WireStub(), BrokenLink()
    pair.feed(Expect(T, (0,), 8, 0))
    pair.last_epoch = 1
    assert pair.attach(wire, link, 1)
    wire.on_message(OfferTransfer(1, T, 8))
    wire.on_message(KVChunk(1, T, 0, 0, WHOLE, NUM_BYTES, 0))
    assert ends.receive_error(T) == "the connection broke"
    assert link.is_gone and not wire.is_open
    assert pair.is_idle


def test_a_standstill_of_our_own_is_not_taken_for_a_silent_peer() -> None:
    now_s = [0.0]
    here, ends = local(lambda: now_s[0])
    hub = TransferHub(here, lambda pair, epoch: SimpleNamespace(cancel=lambda: None))
    hub.expect(("p", 1), Expect(T, (0,), 8, 0))
    pair = hub.admit(cast(Connect, greeting(1)))
    assert isinstance(pair, InboundPair)
    wire = WireStub()
    assert pair.attach(wire, BrokenLink(), 1)
    wire.on_message(OfferTransfer(1, T, 8))
    now_s[0] = 100.0  # nothing has run here for so long
    num_beats = 0
    while wire.is_open:
        hub.tick()
        now_s[0] += here.config.heartbeat_s / 2
        num_beats += 1
    assert num_beats >= 10  # with so much silence while we were awake it is dead
    assert ends.receive_error(T) == "no sign of life for 3.0 s"


def test_a_link_that_breaks_during_a_send_fails_its_transfer_at_once() -> None:
    here, ends = local()
    dialling = SimpleNamespace(cancel=lambda: None)
    target = TransferAddress("d", 1, "here", "", "127.0.0.1", 1)
    pair, wire, link = (
        OutboundPair(here, target, lambda pair, epoch: dialling),
        WireStub(),
        BrokenLink(),
    )
    pair.feed(OpenTransfer(T, (0,), 8))
    pair.connected(wire, link, 1, ())
    pair.feed(PartComputed(T, WHOLE))
    pair.feed(CommitReady(T, b""))
    wire.on_message(Accept(1, T, 0, 1))
    assert ends.send_error(T) == "the connection broke"
    assert link.is_gone and not wire.is_open
    assert pair.is_idle


async def test_a_pair_waits_for_each_connection_that_is_being_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, _ = local()
    pair, fails = InboundPair(here, "p"), [asyncio.Event(), asyncio.Event()]

    async def prepare(channel: object, kind: str, epoch: int) -> Link:
        await fails[epoch - 1].wait()
        raise OSError("no ring")

    links = LinkMaker("127.0.0.1", here.config, None, lambda why: None)
    acceptor = TransferAcceptor(here, Membership("d", 1, "secret", "127.0.0.1"), links, lambda connect: pair)
    monkeypatch.setattr(acceptor, "_prepare_group", prepare)
    try:
        for epoch in (1, 2):
            acceptor._on_greeting(cast(Any, WireStub()), greeting(epoch))
        first, second = acceptor._preparing
        await asyncio.sleep(0)
        fails[0].set()
        await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
        assert not pair.is_idle
        fails[1].set()
        await asyncio.wait((first, second))
        assert pair.is_idle
    finally:
        acceptor.stop_listening()


async def test_a_connection_is_closed_though_its_handshake_never_began() -> None:
    """The acceptor closes in the turn of the loop in which it has accepted it."""
    here, _ = local()
    links = LinkMaker("127.0.0.1", here.config, None, lambda why: None)
    membership = Membership("d", 1, "secret", "127.0.0.1")
    acceptor = TransferAcceptor(here, membership, links, lambda connect: "refused")
    accepted: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(acceptor.unix_path)
        listener = cast(Any, AcceptingSocket(acceptor._unix, accepted))
        acceptor._accept(listener)
        await acceptor.close()
    assert [sock.fileno() for sock in accepted] == [-1]


@dataclass
class AcceptingSocket:
    """A listener that remembers what it has accepted."""

    listener: socket.socket
    accepted: list[socket.socket]

    def accept(self) -> tuple[socket.socket, object]:
        sock, address = self.listener.accept()
        self.accepted.append(sock)
        return sock, address


def greeting(epoch: int) -> SenderMessage:
    return Connect(
        version=PROTOCOL_VERSION,
        source_worker_id="p",
        source_incarnation=1,
        target_worker_id="d",
        target_incarnation=1,
        epoch=epoch,
        link="gloo",
        layout=layout(),
    )
