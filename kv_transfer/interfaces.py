"""The interfaces that the transfer needs of the worker around it: its KV blocks, and a listener for the end
of each transfer."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..core.failures import FailureKind
from ..core.messages import KVLayout, TransferAddress, TransferStats
from ..core.request import TransferId

# memory of a link's slot, passed to the store as it is: a memoryview, or a uint8 tensor on the link's GPU
Slot = Any


class Pending(Protocol):
    """A store's work that its device has yet to do. Works are done in the order in which they were
    requested."""

    def is_done(self) -> bool:
        """Returns whether the work is done; cheap. Raises the error that occurred."""
        ...

    def collect(self) -> int:
        """Returns the checksum of the bytes that were read or written; called once, after the work is
        done."""
        ...


class KVStore(Protocol):
    """Paged KV memory. Token `t` of a transfer is in `block_ids[t // block_size]`; ranges are half-open and
    count from the transfer's first token; heads are counted from the store's first, None are all of them.
    Bytes on the wire are [layers, 2 (K, V), kv_heads, tokens, head_dim], C-contiguous; the layout's `wire`
    states any other format.

    A store on a device returns before the work is done, works behind a mark, and checks the bytes it scatters
    as it reads them."""

    @property
    def layout(self) -> KVLayout:
        """The layout of what this store holds: on a rank of several, of its heads alone."""
        ...

    def mark(self) -> int:
        """Names all work queued until now, on the thread that queues steps on the device. 0 where nothing is
        ahead."""
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
        heads: range | None = None,
    ) -> int | Pending:
        """Copies KV out of the blocks into `out`, whose size is that of the ranges; returns the `checksum` of
        the copy. The mark `after` was set when the last of the KV was computed, or its computation was
        queued."""
        ...

    def checksum(self, data: Slot) -> int | None:
        """Returns 64 bits, the same on either side; None where `scatter` reports the checksum."""
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
        heads: range | None = None,
    ) -> Pending | None:
        """Copies `data` into the blocks; touches no other token and no other head of them. None: it is done.
        The mark `after` was set when the blocks were reserved."""
        ...


class Gpu(Protocol):
    """The GPU that holds a store's blocks, and memory on it that two processes share."""

    uuid: str
    device: Any  # a torch device

    def allocate(self, num_bytes: int) -> "tuple[Slot, bytes]":
        """Allocates memory that lasts as long as this process; returns it with the handle that another
        process needs to `open` it. Raises LinkError."""
        ...

    def open(self, handle: bytes, num_bytes: int) -> Slot:
        """Opens memory of another process; it is released with the last tensor over it. Raises LinkError."""
        ...


class ControlStream(Protocol):
    """A pair's control stream, see `Channel`."""

    on_message: Callable[[Any], None]
    on_lost: Callable[[str], None]

    @property
    def is_open(self) -> bool: ...
    def send(self, message: object, fd: int | None = None) -> None: ...
    def close(self) -> None: ...


class TransferPort(Protocol):
    """The calls of a worker, as `TransferEndpoint` describes them."""

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Sequence[int],
        num_tokens: int,
        num_cached_tokens: int,
        num_source_ranks: int,
    ) -> None: ...
    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Sequence[int], num_tokens: int
    ) -> None: ...
    def extend(self, transfer: TransferId, block_ids: Sequence[int]) -> None: ...
    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None: ...
    def prefill_done(self, transfer: TransferId) -> None: ...
    def commit(self, transfer: TransferId, payload: bytes) -> None: ...
    def cancel(self, transfer: TransferId, error: str = ..., kind: FailureKind = ...) -> None: ...


class TransferListener(Protocol):
    """Called on the endpoint's thread; must not block. Each `send` and each `expect` ends in exactly one call
    of its two callbacks."""

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        """Every byte is verified and in the blocks; `payload` is the value that the sender gave to
        `commit`."""
        ...

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """No write into the blocks will follow: they may be freed."""
        ...

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        """The receiver has all KV: the blocks may be freed."""
        ...

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """No read of the blocks will follow: they may be freed."""
        ...
