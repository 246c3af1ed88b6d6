"""How the ranks of an instance find each other: rank 0 listens, the others connect, and both sides prove that
they belong to the cluster and run as the same user."""

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from ..core.handshake import MAX_WAIT_S, HandshakeAcceptor, HandshakeDialler, HandshakeError, Purpose
from ..core.messages import HEARTBEAT_S
from ..core.peer_log import peer_log
from .rank_messages import MAX_MESSAGE_BYTES, Join, Welcome, decode, encode
from .router_link import shake_hands

MEETING_S = 120.0  # for all ranks of an instance to start
RETRY_S = 0.05
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def meeting_point(token: str, worker_id: str, incarnation: int) -> str:
    """Returns the name of rank 0's socket, in Linux's abstract namespace: it leaves nothing behind. Only the
    cluster's own processes can compute it."""
    name = f"{worker_id}/{incarnation}".encode()
    return "\0pdserve-ranks-" + hmac.digest(token.encode(), name, hashlib.sha256).hex()


class RankMeeting:
    """Rank 0's listening end, until all ranks have joined."""

    def __init__(self, token: str, point: str) -> None:
        """Raises OSError when another process listens there."""
        self._token = token
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(point)
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            raise
        self._joined: dict[int, socket.socket] = {}

    def gather(self, num_ranks: int, group: str, is_over: Callable[[], bool]) -> dict[int, socket.socket]:
        """Returns the connections by rank, once ranks 1 to `num_ranks` - 1 have joined and know where `group`
        is. Raises TimeoutError when one does not come in time, or `is_over`."""
        due_s = time.monotonic() + MEETING_S
        try:
            while len(self._joined) < num_ranks - 1:
                if is_over() or time.monotonic() > due_s:
                    missing = sorted(set(range(1, num_ranks)) - self._joined.keys())
                    raise TimeoutError(f"ranks {', '.join(map(str, missing))} have not joined in time")
                self._listener.settimeout(HEARTBEAT_S)
                with suppress(TimeoutError):
                    self._admit(self._listener.accept()[0], num_ranks, group)
        except BaseException:
            for sock in self._joined.values():
                sock.close()
            raise
        finally:
            self._listener.close()
        return self._joined

    def _admit(self, sock: socket.socket, num_ranks: int, group: str) -> None:
        try:
            _check_user(sock)
            _answer(sock, HandshakeAcceptor(self._token, Purpose.RANKS))
            message = decode(sock.recv(MAX_MESSAGE_BYTES))
            if not isinstance(message, Join) or message.rank not in range(1, num_ranks):
                raise ConnectionError(f"expected a rank of {num_ranks} to join, got {message}")
            if message.rank in self._joined:
                raise ConnectionError(f"rank {message.rank} is there already")
            sock.send(encode(Welcome(group)))
        except (OSError, HandshakeError) as error:
            peer_log.warning("refused a connection: %s", error)
            sock.close()
            return
        sock.settimeout(None)
        self._joined[message.rank] = sock


def join(token: str, point: str, rank: int) -> tuple[socket.socket, str]:
    """Joins an instance as rank 1 or above; returns the connection to rank 0, and where the group is. Raises
    OSError when rank 0 does not come, or ends."""
    due_s = time.monotonic() + MEETING_S
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _connect(sock, point, due_s)
        _check_user(sock)
        shake_hands(sock, HandshakeDialler(token, Purpose.RANKS), "rank 0")
        sock.send(encode(Join(rank)))
        answer = decode(sock.recv(MAX_MESSAGE_BYTES))
        if not isinstance(answer, Welcome):
            raise ConnectionError(f"expected to be welcome, got {answer}")
        sock.settimeout(None)
        return sock, answer.group
    except BaseException:
        sock.close()
        raise


def _connect(sock: socket.socket, point: str, due_s: float) -> None:
    """Waits for rank 0 to listen, which may have started later."""
    while True:
        try:
            sock.connect(point)
            return
        except ConnectionRefusedError:
            if time.monotonic() > due_s:
                raise TimeoutError("rank 0 has not started in time") from None
            time.sleep(RETRY_S)


def _check_user(sock: socket.socket) -> None:
    """Raises ConnectionError for a process of another user."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(found)
    if uid != os.geteuid():
        raise ConnectionError(f"the peer runs as user {uid}, expected {os.geteuid()}")


def _answer(sock: socket.socket, acceptor: HandshakeAcceptor) -> None:
    """Authenticates a process that has connected. Raises OSError or HandshakeError."""
    due_s = time.monotonic() + MAX_WAIT_S
    while acceptor.num_wanted:
        sock.settimeout(max(0.001, due_s - time.monotonic()))
        data = sock.recv(acceptor.num_wanted)
        if len(data) != acceptor.num_wanted:
            raise HandshakeError("the peer hung up before it had proved that it belongs to this cluster")
        if answer := acceptor.take(data):
            sock.send(answer)
