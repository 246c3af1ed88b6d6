"""A rank's connections to others of its instance while it runs: rank 0's to all, theirs to rank 0.

An instance is one worker: a rank that ends or stands still ends them all."""

import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..core.messages import HEARTBEAT_S
from .rank_messages import MAX_MESSAGE_BYTES, Beat, Failed, Leave, RankMessage, decode, encode
from .rank_watch import RankWatch

LEAVE_S = 5.0  # for the others to end in order


class RankLinks:
    """One thread reads all connections and sends beats; it calls `on_message` and `on_lost`."""

    def __init__(
        self,
        sockets: Mapping[int, socket.socket],
        on_message: Callable[[int, RankMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """`sockets`: by rank. `on_lost` is called once, with the reason why the instance is over."""
        self._sockets = sockets
        self._on_message = on_message
        self._on_lost = on_lost
        self._watch = RankWatch(sockets)
        self.cpu_s = dict.fromkeys(sockets, 0.0)  # processor time of the others
        self._thread = threading.Thread(target=self._run, name="rank-links", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, rank: int, message: RankMessage) -> None:
        """Sends from any thread; to a rank that is gone, nothing."""
        with suppress(OSError):
            self._sockets[rank].send(encode(message), socket.MSG_NOSIGNAL)

    def leave(self) -> None:
        """Rank 0: asks the others to end in order, and returns when they have, or have had the time."""
        self._watch.is_leaving = True
        self._send_all(Leave())
        self._thread.join(LEAVE_S)
        self.close()

    def close(self) -> None:
        """Hangs up; idempotent."""
        self._watch.is_leaving = True
        for sock in self._sockets.values():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join()
        for sock in self._sockets.values():
            sock.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, sock in self._sockets.items():
                selector.register(sock, selectors.EVENT_READ, rank)
            why, due_s = None, time.monotonic()
            while why is None and selector.get_map():
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + HEARTBEAT_S
                    self._send_all(Beat(time.process_time()))
                    why = self._watch.beat()
                for key, _ in selector.select(max(0.0, due_s - time.monotonic())):
                    message = self._receive(key.data)
                    if message is None:
                        selector.unregister(key.fileobj)
                        why = why or self._watch.ended(key.data)
                    elif isinstance(message, Failed):
                        why = why or f"rank {key.data}: {message.why}"
        if why is not None:
            self._on_lost(why)

    def _send_all(self, message: RankMessage) -> None:
        """Does not wait: a rank that takes nothing stands still, and is watched."""
        for sock in self._sockets.values():
            with suppress(OSError):
                sock.send(encode(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _receive(self, rank: int) -> RankMessage | None:
        """Handles a message and returns it; None when there will be no more."""
        try:
            message = decode(self._sockets[rank].recv(MAX_MESSAGE_BYTES))
        except OSError:
            return None
        self._watch.heard(rank)
        if isinstance(message, Leave):
            self._watch.is_leaving = True
        if isinstance(message, Beat):
            self.cpu_s[rank] = message.cpu_s
        elif not isinstance(message, Failed):
            self._on_message(rank, message)
        return message
