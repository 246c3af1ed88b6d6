"""Peers that die, freeze, or violate the protocol: D's blocks stay intact and every transfer ends."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdserve.core.codec import FrameDecoder, FrameEncoder
from pdserve.core.failures import FailureKind
from pdserve.core.handshake import OPENING_BYTES, HandshakeDialler, Purpose
from pdserve.core.messages import TransferAddress
from pdserve.core.request import TransferId
from pdserve.kv_transfer.protocol import (
    PROTOCOL_VERSION,
    Accept,
    Ack,
    Commit,
    Connect,
    Connected,
    KVChunk,
    LinkHeartbeat,
    Nack,
    OfferTransfer,
    Prepare,
    ReceiverMessage,
)
from pdserve.kv_transfer.shm import ShmLink
from pdserve.kv_transfer.span import Span

from ..handshakes import shake_hands
from .support import CALM, MORTAL, WAIT_S, Worker, layout

T = TransferId("request", 0)
CELL_BYTES = layout().bytes_per_token // layout().num_layers


class RawPeer:
    """A sender that a test controls message by message."""

    def __init__(self, target: TransferAddress, epoch: int = 1) -> None:
        self.epoch = epoch
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(target.unix_path)
        shake_hands(self._sock, HandshakeDialler("secret", Purpose.TRANSFER))
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[Any] = FrameDecoder(ReceiverMessage)
        self._inbox: list[Any] = []
        self.say(
            Connect(
                version=PROTOCOL_VERSION,
                source_worker_id="p",
                source_incarnation=1,
                target_worker_id=target.worker_id,
                target_incarnation=target.incarnation,
                epoch=epoch,
                link="shm",
                layout=layout(),
            )
        )
        try:
            self.link = self._attach()
        except BaseException:
            self._sock.close()
            raise

    def _attach(self) -> ShmLink:
        data, fds, _, _ = socket.recv_fds(self._sock, 65536, 1)
        self._inbox += self._decoder.feed(data)
        prepare = self.hear(Prepare)
        self.hear(Connected)
        try:
            return ShmLink.attach(fds[0], prepare.num_slots, prepare.slot_bytes)
        finally:
            os.close(fds[0])

    def say(self, message: object) -> None:
        self._sock.sendall(self._encoder.encode(message))

    def hear(self, kind: type[Any]) -> Any:
        """Returns the next message of `kind`; skips heartbeats."""
        while True:
            while self._inbox:
                message = self._inbox.pop(0)
                if not isinstance(message, LinkHeartbeat):
                    assert isinstance(message, kind), message
                    return message
            data = self._sock.recv(65536)
            assert data, f"closed while waiting for {kind.__name__}"
            self._inbox += self._decoder.feed(data)

    def chunk(self, seq: int, span: Span, slot: int = 0, fill: int = 9, transfer: TransferId = T) -> KVChunk:
        """Announces a correct chunk, its bytes in the ring."""
        num_bytes = span.num_cells * CELL_BYTES
        data = self.link.slot(slot, num_bytes)
        data[:] = bytes([fill]) * num_bytes
        return KVChunk(self.epoch, transfer, seq, slot, span, num_bytes, zlib.crc32(data))

    def is_closed(self) -> bool:
        while True:
            data = self._sock.recv(65536)
            if not data:
                return True

    def close(self) -> None:
        self._sock.close()
        self.link.kill()


@contextmanager
def raw_pair() -> Iterator[tuple[RawPeer, Worker]]:
    """Opens an accepted transfer of 16 tokens into blocks 1 and 2."""
    receiver = Worker("d", layout())
    try:
        receiver.expect(T, ("p", 1), [1, 2], 16)
        peer = RawPeer(receiver.address)
        try:
            peer.say(OfferTransfer(peer.epoch, T, 16))
            assert peer.hear(Accept).token_start == 0
            yield peer, receiver
        finally:
            peer.close()
    finally:
        receiver.endpoint.close()


WHOLE = Span(0, 3, 0, 16)
HALF = Span(0, 3, 0, 8)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"checksum": 1}, "do not have the announced checksum"),
        ({"num_bytes": 8}, "8 bytes, expected"),
        ({"num_bytes": -8}, "-8 bytes, expected"),
        ({"slot": 99}, "slot 99 of 4 is not free"),
        ({"slot": -1}, "slot -1 of 4 is not free"),
        ({"span": Span(0, 3, 9, 17)}, "outside of"),
        ({"span": Span(1, 4, 0, 8)}, "outside of"),
    ],
)
def test_a_wrong_chunk_is_refused_before_it_reaches_the_blocks(change: dict[str, Any], error: str) -> None:
    with raw_pair() as (peer, receiver):
        peer.say(msgspec.structs.replace(peer.chunk(0, HALF), **change))
        nack = peer.hear(Nack)
        assert error in nack.error
        assert nack.kind is (FailureKind.CORRUPT if "checksum" in change else FailureKind.DISAGREEMENT)
        assert peer.is_closed()
        assert error in receiver.ends.receive_error(T)
        assert receiver.store.num_scattered == 0
        assert receiver.endpoint.counters.num_nacks == 1


def test_a_duplicate_chunk_is_refused() -> None:
    with raw_pair() as (peer, receiver):
        peer.say(peer.chunk(0, HALF))
        peer.hear(Ack)
        peer.say(peer.chunk(1, HALF, fill=1))
        assert "has arrived before" in peer.hear(Nack).error
        receiver.ends.receive_error(T)
        assert (receiver.store.read([1, 2], 0, 8) == 9).all()


def test_a_commit_with_cells_missing_is_refused() -> None:
    with raw_pair() as (peer, receiver):
        peer.say(peer.chunk(0, HALF))
        peer.say(Commit(peer.epoch, T, b""))
        peer.hear(Ack)
        assert "24 (layer, token) cells missing" in peer.hear(Nack).error
        receiver.ends.receive_error(T)


def test_messages_of_another_epoch_or_attempt_are_dropped() -> None:
    with raw_pair() as (peer, receiver):
        peer.say(msgspec.structs.replace(peer.chunk(0, WHOLE, fill=1), epoch=99))
        peer.say(Commit(99, T, b"old"))
        peer.say(peer.chunk(0, WHOLE, fill=2, transfer=TransferId("request", 7)))
        peer.hear(Ack)
        peer.say(Commit(peer.epoch, TransferId("request", 7), b"older"))
        peer.say(peer.chunk(1, WHOLE, fill=3))
        peer.say(Commit(peer.epoch, T, b"mine"))
        assert receiver.ends.received(T) == b"mine"
        assert (receiver.store.read([1, 2], 0, 16) == 3).all()
        assert receiver.endpoint.counters.num_stale_messages == 4
        peer.say(Commit(peer.epoch, T, b"again"))
        peer.say(peer.chunk(2, WHOLE, fill=4))
        peer.hear(Ack)
        assert receiver.ends.received(T) == b"mine"
        assert (receiver.store.read([1, 2], 0, 16) == 3).all()


def test_a_new_epoch_fences_the_old_one() -> None:
    with raw_pair() as (old, receiver):
        new = RawPeer(receiver.address, epoch=2)
        try:
            assert old.is_closed()
            assert "connected anew" in receiver.ends.receive_error(T)
            with pytest.raises(AssertionError, match=r"epoch 1 of p \(incarnation 1\) is over"):
                RawPeer(receiver.address, epoch=1)
        finally:
            new.close()


@pytest.mark.parametrize(
    "first",
    [
        b"\xff" * OPENING_BYTES,
        FrameEncoder().encode(OfferTransfer(1, T, 3)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        HandshakeDialler("secret", Purpose.CONTROL).opening,
        HandshakeDialler("guess", Purpose.TRANSFER).opening + bytes(32),
        HandshakeDialler("secret", Purpose.TRANSFER).opening + b"x" * (1 << 20),
    ],
)
def test_unauthenticated_peers_are_disconnected_and_others_are_served(first: bytes) -> None:
    """Also peers that send only half a greeting, or nothing: their time is bounded."""
    receiver = Worker("d", layout(), config=replace(CALM, connect_timeout_s=3.0))  # enough for the last one
    try:
        address = receiver.address.tcp_host, receiver.address.tcp_port
        # bytes left unread when the server closed the connection turn the close into a reset
        with socket.create_connection(address, WAIT_S) as sock, suppress(ConnectionError):
            sock.sendall(first)
            while sock.recv(4096):
                pass
        assert receiver.endpoint.counters.num_connects_refused == 1
        peer = RawPeer(receiver.address)
        peer.close()
    finally:
        receiver.endpoint.close()


@pytest.fixture
def socket_root() -> Iterator[Path]:
    """A folder for the remains of a killed process; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        yield Path(root)


CHILD = """
import sys
from pathlib import Path
from pdserve.core.request import TransferId
from tests.kv_transfer.support import Worker, layout
import msgspec
from pdserve.core.messages import TransferAddress
target = msgspec.json.decode(sys.argv[1], type=TransferAddress)
if sys.argv[2] == "gloo":
    import torch.distributed
worker = Worker("p", layout(), seed=1, transport=sys.argv[2], socket_root=Path(sys.argv[3]))
transfer = TransferId("request", 0)
worker.endpoint.send(transfer, target, list(range(8)), 64)
worker.endpoint.computed(transfer, 0, 3, 0, 56)
sys.stdin.read()
"""


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_killed_or_frozen_fails_its_transfers(
    transport: str, what: signal.Signals, socket_root: Path
) -> None:
    receiver = Worker("d", layout(), transport=transport, config=MORTAL if what == signal.SIGSTOP else CALM)
    arrived = threading.Semaphore(0)
    receiver.store.on_scatter = arrived.release
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            msgspec.json.encode(receiver.address).decode(),
            transport,
            str(socket_root),
        ],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["."] + sys.path)},
    )
    try:
        receiver.expect(T, ("p", 1), list(range(8)), 64)
        assert arrived.acquire(timeout=WAIT_S), "the child never sent anything"
        child.send_signal(what)
        error = receiver.ends.receive_error(T)
        assert ("no sign of life" in error) == (what == signal.SIGSTOP)
        assert receiver.endpoint.counters.num_links_closed == 1
        assert [path.name[:3] for path in socket_root.iterdir()] == ["kv-"], "where it goes with the session"
    finally:
        child.kill()
        child.communicate()
        receiver.endpoint.close()
