"""Where the two ends of a link under construction exchange what they need of each other: addresses, ids.

Entries travel on the pair's authenticated control stream. So a link over gloo needs no port beside that of
its data, and no name service: torch's own store looks the peer's name up, and without a name server that
takes longer than a link may."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Protocol

from .channel import Channel
from .link import Link, LinkError, PeerLost, TransferTimeout
from .protocol import Meet

RECEIVER_RANK, SENDER_RANK = 0, 1
MAX_ENTRIES = 64  # from the peer: a link needs a few


class Meeting:
    """Entries by key. The loop calls `put` and `close`; the thread that builds the link calls `set` and
    `get`."""

    def __init__(self, send: Callable[[str, bytes], None]) -> None:
        """`send` makes the other end `put` an entry, and may be called on any thread."""
        self._send = send
        self._entries: dict[str, bytes] = {}
        self._num_put = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        """Leaves an entry, for both ends."""
        self._add(key, value)
        self._send(key, value)

    def put(self, key: str, value: bytes) -> None:
        """Records an entry of the other end. Raises LinkError for more of them than any link needs."""
        self._num_put += 1
        if self._num_put > MAX_ENTRIES:
            raise LinkError(f"the peer left more than {MAX_ENTRIES} entries")
        self._add(key, value)

    def get(self, key: str, timeout_s: float) -> bytes:
        """Returns the entry once it has arrived. Raises TransferTimeout, or PeerLost when nothing more will
        arrive."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._entries or self._is_closed, timeout_s):
                raise TransferTimeout(f"the peer did not leave {key!r} within {timeout_s:g} s")
            if key not in self._entries:
                raise PeerLost("the peer went while the link was built")
            return self._entries[key]

    def close(self) -> None:
        """Nothing more will arrive; idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _add(self, key: str, value: bytes) -> None:
        with self._changed:
            self._entries[key] = value
            self._changed.notify_all()


class MeetingLink(Link, Protocol):
    """A link whose two sides meet to build it."""

    def build(self, meeting: Meeting) -> None:
        """Builds this side, on the link's executor; returns when the other side has joined. Raises
        LinkError."""
        ...


def meeting_over(channel: Channel[Any], epoch: int) -> Meeting:
    """Sends its entries over `channel`, which belongs to the running loop; the channel's reader puts those
    that arrive."""
    loop = asyncio.get_running_loop()

    def send(key: str, value: bytes) -> None:
        loop.call_soon_threadsafe(channel.send, Meet(epoch, key, value))

    return Meeting(send)
