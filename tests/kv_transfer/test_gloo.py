"""Links over gloo: what they share, and who may be at their other end."""

import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest

from pdserve.kv_transfer.gloo import GlooLink, open_device
from pdserve.kv_transfer.lanes import Lanes
from pdserve.kv_transfer.link import LinkError
from pdserve.kv_transfer.meeting import RECEIVER_RANK, SENDER_RANK, Meeting

from .meetings import joined_meetings
from .support import WAIT_S

HOST = "127.0.0.1"
MAX_LINKS = 8


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes("pdserve-link")
    yield made
    made.close()


def listening_ports() -> set[int]:
    """Returns this process's own."""
    ports = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.family == socket.AF_INET:
                ports.add(sock.getsockname()[1])
    return ports


def link(rank: int, lanes: Lanes, device: object, timeout_s: float = WAIT_S) -> GlooLink:
    return GlooLink(rank, HOST, 1, 4096, timeout_s, lanes.lane(), device)


def joined(receiver: GlooLink, sender: GlooLink, meetings: tuple[Meeting, Meeting] | None = None) -> None:
    """Builds both ends. Raises LinkError."""
    building = [
        link.executor.submit(link.build, meeting)
        for link, meeting in zip((receiver, sender), meetings or joined_meetings(), strict=True)
    ]
    for each in building:
        each.result(WAIT_S)


def send(receiver: GlooLink, sender: GlooLink, data: bytes, seq: int) -> None:
    """Passes `data`, and checks that it has arrived."""
    sender.slot(0, len(data))[:] = data
    tickets = receiver.recv(0, len(data), seq), sender.send(0, len(data), seq)
    for end, ticket in zip((receiver, sender), tickets, strict=True):
        end.executor.submit(end.wait, ticket, WAIT_S).result(WAIT_S)
    assert receiver.slot(0, len(data)) == data


def test_threads_and_ports_do_not_grow_with_the_links(lanes: Lanes) -> None:
    device, pairs = open_device(HOST), []
    counts = []
    for number in range(MAX_LINKS):
        pairs.append((link(RECEIVER_RANK, lanes, device), link(SENDER_RANK, lanes, device)))
        joined(*pairs[-1])
        for receiver, sender in pairs:
            send(receiver, sender, b"%d of a pair" % number, number)
        counts.append((len(os.listdir("/proc/self/task")), len(listening_ports())))
    assert counts[-1] == counts[0]
    for end in (end for pair in pairs for end in pair):
        end.kill()
        end.join()
        assert end.is_gone


def test_links_outlive_one_another_on_their_device(lanes: Lanes) -> None:
    device = open_device(HOST)
    first, second = ((link(RECEIVER_RANK, lanes, device), link(SENDER_RANK, lanes, device)) for _ in range(2))
    joined(*first)
    joined(*second)
    for end in first:
        end.kill()
        end.join()
    send(*second, b"still here", 0)
    for end in second:
        end.kill()


@contextmanager
def echoing_strangers(port: int) -> Iterator[None]:
    """Connects in advance under the sequence numbers of the next links, and returns all bytes that come."""
    with ExitStack() as stack:
        echoes = stack.enter_context(ThreadPoolExecutor(MAX_LINKS))
        for number in range(MAX_LINKS):
            sock = stack.enter_context(socket.create_connection((HOST, port)))
            sock.sendall(struct.pack("q", number))
            stack.callback(hang_up, sock)
            echoes.submit(echo, sock)
        yield


def hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # the other end was faster
        sock.shutdown(socket.SHUT_RDWR)


def echo(sock: socket.socket) -> None:
    with suppress(OSError):
        while data := sock.recv(4096):
            sock.sendall(data)


def test_a_stranger_in_the_peers_place_gets_no_link(lanes: Lanes) -> None:
    before = listening_ports()
    device = open_device(HOST)
    (port,) = listening_ports() - before
    with echoing_strangers(port):
        ends = link(RECEIVER_RANK, lanes, device, 1.0), link(SENDER_RANK, lanes, device, 1.0)
        with pytest.raises(LinkError):
            joined(*ends)
        for end in ends:
            end.kill()
            end.join()


def test_an_end_that_returns_another_secret_gets_no_link(lanes: Lanes) -> None:
    def altered(key: str, value: bytes) -> None:
        other.put(key, value[::-1] if key.startswith("secret") else value)

    one = Meeting(altered)
    other = Meeting(one.put)
    device = open_device(HOST)
    ends = link(RECEIVER_RANK, lanes, device), link(SENDER_RANK, lanes, device)
    with pytest.raises(LinkError, match="is not the peer"):
        joined(*ends, (one, other))
    for end in ends:
        end.kill()
        end.join()
