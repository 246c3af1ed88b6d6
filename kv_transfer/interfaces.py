"""What the transfer needs of the worker around it: its KV blocks, and someone to tell how a transfer ended."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..core.messages import KVLayout, TransferStats
from ..core.request import TransferId


class KVStore(Protocol):
    """Paged KV memory. Token `t` of a transfer lives in `block_ids[t // block_size]`; ranges are half-open and count from
    the transfer's first token. Bytes on the wire are [layers, 2 (K, V), kv_heads, tokens, head_dim], C-contiguous."""

    @property
    def layout(self) -> KVLayout: ...

    def gather(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        out: memoryview,
    ) -> int:
        """Copy KV out of the blocks into `out`, whose size is that of the ranges; returns the `checksum` of what was copied."""
        ...

    def checksum(self, data: memoryview) -> int:
        """64 bits, the same on either side."""
        ...

    def scatter(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        data: memoryview,
    ) -> None:
        """Copy `data` into the blocks; touches no other token of them."""
        ...


class Stream(Protocol):
    """A pair's control stream, see `Channel`."""

    on_message: Callable[[Any], None]
    on_lost: Callable[[str], None]

    def send(self, message: object, fd: int | None = None) -> None: ...
    def close(self) -> None: ...


class TransferListener(Protocol):
    """Called on the endpoint's thread; must not block. Each `send` and each `expect` ends in exactly one of its two."""

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        """Every byte is verified and in the blocks; `payload` is what the sender gave to `commit`."""
        ...

    def on_receive_failed(self, transfer: TransferId, error: str) -> None:
        """No write into the blocks will follow: they may be freed."""
        ...

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        """The receiver has it all: the blocks may be freed."""
        ...

    def on_send_failed(self, transfer: TransferId, error: str) -> None:
        """No read of the blocks will follow: they may be freed."""
        ...
