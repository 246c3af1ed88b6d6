"""Two processes of one cluster prove to each other that they know its token, which never travels. Pure: bytes
in, bytes out.

    dialler --OPENING: protocol, purpose, nonce of the dialler------------> acceptor
    dialler <--nonce of the acceptor, HMAC(token, "acceptor" and all that)-- acceptor
    dialler --HMAC(token, "dialler" and all that)-------------------------> acceptor

Every message has a fixed length, so the reader knows how much to wait for, and an unauthenticated peer cannot
make it more. The roles in the HMACs keep a proof from being reflected to its sender, the purpose from being
used on another kind of connection. The handshake authenticates peers when a connection begins; it neither
encrypts nor signs later data."""

import hashlib
import hmac
import secrets
from enum import Enum

from .errors import PdserveError

NONCE_BYTES = 32
PROOF_BYTES = 32
_PROTOCOL = b"pdserve-handshake-1\n"
MAX_WAIT_S = 5.0  # for the whole of it
MAX_UNPROVEN = 256  # connections of unauthenticated peers that an acceptor keeps; then the oldest is closed


class Purpose(Enum):
    """The purpose of a connection."""

    CONTROL = b"control "  # control of a worker by the router
    TRANSFER = b"transfer"  # transfer of KV between workers
    RANKS = b"ranks   "  # between the ranks of one instance


OPENING_BYTES = len(_PROTOCOL) + len(Purpose.CONTROL.value) + NONCE_BYTES


class HandshakeError(PdserveError):
    """The peer is not of this cluster, or does not speak its protocol."""


class HandshakeDialler:
    """The side that connects. It sends `opening`, then answers what comes."""

    def __init__(self, token: str, purpose: Purpose) -> None:
        self.opening = _PROTOCOL + purpose.value + secrets.token_bytes(NONCE_BYTES)
        self.num_wanted = NONCE_BYTES + PROOF_BYTES  # bytes of the next message; 0: both sides know
        self._token = token.encode()

    def take(self, message: bytes) -> bytes:
        """The answer to a message of `num_wanted` bytes. Raises HandshakeError."""
        assert len(message) == self.num_wanted, "a message is taken whole"
        said = self.opening + message[:NONCE_BYTES]
        _check(message[NONCE_BYTES:], _proof(self._token, b"acceptor", said))
        self.num_wanted = 0
        return _proof(self._token, b"dialler", said)


class HandshakeAcceptor:
    """The side that was connected to. It has nothing to say before it has heard the dialler."""

    opening = b""

    def __init__(self, token: str, purpose: Purpose) -> None:
        self.num_wanted = OPENING_BYTES
        self._token = token.encode()
        self._expected = _PROTOCOL + purpose.value
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._said = b""

    def take(self, message: bytes) -> bytes:
        """The answer to a message of `num_wanted` bytes. Raises HandshakeError."""
        assert len(message) == self.num_wanted, "a message is taken whole"
        if not self._said:
            if not message.startswith(self._expected):
                raise HandshakeError("the peer does not speak this protocol")
            self._said = message + self._nonce
            self.num_wanted = PROOF_BYTES
            return self._nonce + _proof(self._token, b"acceptor", self._said)
        _check(message, _proof(self._token, b"dialler", self._said))
        self.num_wanted = 0
        return b""


class HandshakeStream:
    """A side of the handshake on a stream, whose pieces come as they like."""

    def __init__(self, side: HandshakeDialler | HandshakeAcceptor) -> None:
        self._side = side
        self._data = bytearray()  # less than a message

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Returns the answer to send, and the part of `data` behind the handshake. Raises HandshakeError."""
        if not self._side.num_wanted:
            return b"", data
        self._data += data
        answer = b""
        while self._side.num_wanted and len(self._data) >= self._side.num_wanted:
            if answer:
                raise HandshakeError("the peer did not wait for its turn")
            message = bytes(self._data[: self._side.num_wanted])
            del self._data[: len(message)]
            answer = self._side.take(message)
        if self._side.num_wanted and answer and self._data:
            raise HandshakeError("the peer did not wait for its turn")
        rest = b"" if self._side.num_wanted else bytes(self._data)
        return answer, rest


def _proof(token: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(token, role + b"\0" + said, hashlib.sha256)


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise HandshakeError("the peer does not know this cluster's token")
