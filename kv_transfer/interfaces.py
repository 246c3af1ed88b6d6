"""What the transfer needs of the worker around it: its KV blocks, and someone to tell how a transfer
ended."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..core.failures import FailureKind
from ..core.messages import KVLayout, TransferStats
from ..core.request import TransferId

# memory of a link's slot, handed to the store as it is: a memoryview, or a uint8 tensor on the link's GPU
Slot = Any


class Pending(Protocol):
    """A store's work that its device has yet to do. A store's works are done in the order in which they were
    asked for."""

    def is_done(self) -> bool:
        """Cheap. Raises what went wrong."""
        ...

    def collect(self) -> int:
        """Once it is done, and once: the checksum of the bytes that were read or written."""
        ...


class KVStore(Protocol):
    """Paged KV memory. Token `t` of a transfer lives in `block_ids[t // block_size]`; ranges are half-open
    and count from the transfer's first token. Bytes on the wire are [layers, 2 (K, V), kv_heads, tokens,
    head_dim], C-contiguous; another format is the layout's `wire`.

    A store on a device answers before the work is done, comes behind a mark, and checks what it scatters as
    it reads it."""

    @property
    def layout(self) -> KVLayout: ...

    def mark(self) -> int:
        """On the thread that gives steps to the device: names all that it was given until now. 0 where
        nothing is ahead."""
        ...

    def gather(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        out: Slot,
        after: int = 0,
    ) -> int | Pending:
        """Copy KV out of the blocks into `out`, whose size is that of the ranges; returns the `checksum` of
        what was copied. The mark `after` was set when the last of it was computed, or given to the device to
        be."""
        ...

    def checksum(self, data: Slot) -> int | None:
        """64 bits, the same on either side; None where `scatter` tells it."""
        ...

    def scatter(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        data: Slot,
        after: int = 0,
    ) -> Pending | None:
        """Copy `data` into the blocks; touches no other token of them. None: it is done. The mark `after` was
        set when the blocks were reserved."""
        ...


class Gpu(Protocol):
    """The GPU that holds a store's blocks, and memory on it that two processes see."""

    uuid: str
    device: Any  # torch's

    def allocate(self, num_bytes: int) -> "tuple[Slot, bytes]":
        """Memory that lives as long as this process, and what another needs to `open` it. Raises
        LinkError."""
        ...

    def open(self, handle: bytes, num_bytes: int) -> Slot:
        """Memory of another process; it is let go with the last tensor over it. Raises LinkError."""
        ...


class Stream(Protocol):
    """A pair's control stream, see `Channel`."""

    on_message: Callable[[Any], None]
    on_lost: Callable[[str], None]

    def send(self, message: object, fd: int | None = None) -> None: ...
    def close(self) -> None: ...


class TransferListener(Protocol):
    """Called on the endpoint's thread; must not block. Each `send` and each `expect` ends in exactly one of
    its two."""

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        """Every byte is verified and in the blocks; `payload` is what the sender gave to `commit`."""
        ...

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """No write into the blocks will follow: they may be freed."""
        ...

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        """The receiver has it all: the blocks may be freed."""
        ...

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """No read of the blocks will follow: they may be freed."""
        ...
