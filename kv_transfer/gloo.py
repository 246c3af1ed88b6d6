"""Link for two hosts without GPUs: a two-rank gloo group of this pair alone, built on a store that D serves.

Gloo aborts a receiver that is sent more than it posted, so D posts what P announced and P sends exactly that. A wait that
times out spoils the group for good: whoever sees one kills the link.
"""

import ipaddress
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .link import PeerLost, TransferTimeout

if TYPE_CHECKING:
    import torch

RECEIVER_RANK, SENDER_RANK = 0, 1


def address_family(host: str) -> socket.AddressFamily:
    """Of an IP address in text. Raises ValueError."""
    return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET


def listening_socket(host: str) -> socket.socket:
    """A listening TCP socket on a free port of `host`. Raises OSError."""
    return socket.create_server((host, 0), family=address_family(host))


@contextmanager
def _link_errors() -> Iterator[None]:
    """Torch says everything by RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        kind = TransferTimeout if "timed out" in str(error).lower() else PeerLost
        raise kind(f"gloo: {error}") from error


class GlooLink:
    """One rank of the pair. Everything that may block runs on the link's own helper thread."""

    def __init__(self, rank: int, host: str, num_slots: int, slot_bytes: int, timeout_s: float) -> None:
        self.is_gone = False
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="pdserve-gloo")
        self._rank = rank
        self._host = host
        self._timeout_s = timeout_s
        self._ring = bytearray(num_slots * slot_bytes)
        self._view = memoryview(self._ring)
        self._tensor: torch.Tensor | None = None
        self._group: Any = None
        self._store: Any = None
        self._is_killed = False

    def serve(self, listener: socket.socket) -> None:
        """D, on the helper thread: serve the store on `listener`, which is taken over, and build this rank."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        timeout, port = timedelta(seconds=self._timeout_s), listener.getsockname()[1]
        with _link_errors():
            self._store = TCPStore(
                self._host, port, 2, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            self._build()

    def connect(self, store_host: str, store_port: int) -> None:
        """P, on the helper thread: build this rank on D's store."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        with _link_errors():
            self._store = TCPStore(store_host, store_port, 2, False, timedelta(seconds=self._timeout_s))
            self._build()

    def _build(self) -> None:
        import torch
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = timedelta(seconds=self._timeout_s)
        options._threads = 1
        self._tensor = torch.frombuffer(self._ring, dtype=torch.uint8)
        self._group = ProcessGroupGloo(self._store, self._rank, 2, options)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def _slot_tensor(self, slot: int, num_bytes: int) -> "torch.Tensor":
        assert self._tensor is not None
        return self._tensor.narrow(0, slot * self.slot_bytes, num_bytes)

    def send(self, slot: int, num_bytes: int, seq: int) -> Any:
        with _link_errors():
            return self._group.send([self._slot_tensor(slot, num_bytes)], RECEIVER_RANK, seq & 0x7FFFFFFF)

    def recv(self, slot: int, num_bytes: int, seq: int) -> Any:
        with _link_errors():
            return self._group.recv([self._slot_tensor(slot, num_bytes)], SENDER_RANK, seq & 0x7FFFFFFF)

    def wait(self, ticket: Any, timeout_s: float) -> None:
        with _link_errors():
            ticket.wait(timedelta(seconds=timeout_s))

    def kill(self) -> None:
        if not self._is_killed:
            self._is_killed = True
            self.executor.submit(self._release)
            self.executor.shutdown(wait=False)

    def _release(self) -> None:
        """Behind any wait that is still under way: an operation's buffers must outlive it."""
        self._group = self._tensor = self._store = None
        self.is_gone = True

    def join(self) -> None:
        self.executor.shutdown(wait=True)
