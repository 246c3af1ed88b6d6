"""Peers that have not proved that they belong to the cluster: which can connect at all, and the cost of a
flood of them."""

import errno
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.handshake import HandshakeDialler, Purpose
from pdserve.core.reach import reach
from pdserve.kv_transfer import acceptor
from pdserve.worker.router_link import shake_hands

from ..other_user import run_as_nobody
from .leftovers import T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .support import CALM, WAIT_S, Worker, layout

NUM_LINES = 100  # of a log, whatever other tests log meanwhile
WAYS = ("unix", "tcp")


@pytest.fixture
def receiver() -> Iterator[Worker]:
    worker = Worker("d", layout())
    yield worker
    worker.endpoint.close()


def connected(receiver: Worker, way: str) -> socket.socket:
    if way == "tcp":
        return socket.create_connection((receiver.address.tcp_host, receiver.address.tcp_port), WAIT_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(receiver.address.unix_path)
    return sock


def check_is_served(receiver: Worker) -> None:
    """A peer of the cluster connects and pushes its KV."""
    sender = Worker("p", layout(), seed=1)
    try:
        receiver.expect(T, sender.key, [1], 8)
        sender.push(T, receiver.address, [1], 8)
        receiver.ends.received(T)
    finally:
        sender.endpoint.close()


def test_the_socket_is_in_a_folder_that_ends_with_the_endpoint() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        worker = Worker("d", layout(), socket_root=Path(root))
        folder = Path(worker.address.unix_path).parent
        try:
            assert folder.parent == Path(root) and folder.stat().st_mode & 0o777 == 0o700
        finally:
            worker.endpoint.close()
        assert list(Path(root).iterdir()) == []


def test_another_user_cannot_connect_and_finds_no_abstract_socket(receiver: Worker) -> None:
    assert not [line for line in Path("/proc/net/unix").read_text().splitlines() if "@pdserve" in line]
    code = "attempt('connect', lambda: connect(sys.argv[1]))"
    assert run_as_nobody(code, receiver.address.unix_path) == ["connect EACCES"]


def test_a_probe_of_this_cluster_succeeds_and_is_no_refusal(
    receiver: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    address = receiver.address.tcp_host, receiver.address.tcp_port

    def probe(token: str) -> str:
        return reach(address, lambda sock: shake_hands(sock, HandshakeDialler(token, Purpose.TRANSFER), "d"))

    assert probe("secret") == ""
    check_is_served(receiver)
    assert receiver.endpoint.counters.num_connects_refused == 0 and not caplog.records
    assert probe("another cluster's") != ""
    receiver.endpoint.close()
    assert probe("secret") == "Connection refused"


@pytest.mark.parametrize("way", WAYS)
def test_a_flood_of_connections_writes_few_lines_and_is_counted(
    receiver: Worker, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(1000):
        with connected(receiver, way) as sock, suppress(ConnectionError):
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
            while sock.recv(4096):
                pass
    assert receiver.endpoint.counters.num_connects_refused == 1000
    assert len(caplog.records) < NUM_LINES
    check_is_served(receiver)


@pytest.mark.parametrize("way", WAYS)
def test_held_connections_do_not_lock_out_others(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "MAX_UNPROVEN", 8)
    receiver = Worker("d", layout(), config=replace(CALM, connect_timeout_s=WAIT_S))
    try:
        with ExitStack() as held:
            idle = [held.enter_context(connected(receiver, way)) for _ in range(20)]
            for oldest in idle[
                :12
            ]:  # all are accepted when these are closed; else they would displace the peer
                with suppress(ConnectionError):
                    assert oldest.recv(1) == b""
            check_is_served(receiver)
    finally:
        receiver.endpoint.close()


def test_a_process_out_of_descriptors_accepts_again_when_some_are_free(
    receiver: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE_S", 0.01)
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]

    def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise OSError(failures.pop(), "not now")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    check_is_served(receiver)
    assert failures == []
    assert (
        len([record for record in caplog.records if "accepting a connection failed" in record.getMessage()])
        <= 3
    )
