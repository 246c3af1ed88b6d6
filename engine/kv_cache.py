"""The KV memory of one device: one tensor of blocks. The model reads and writes it by layer, a transfer by token range."""

import math
import mmap
from collections.abc import Sequence

import torch

from ..core.messages import KVLayout
from ..kernels import Kernels
from .device import Device


class KVCache:
    """Allocated once at start. Which block belongs to whom is `BlockPool`'s business; this is the `KVStore` of transfers."""

    def __init__(self, layout: KVLayout, num_blocks: int, kernels: Kernels, device: Device | None = None) -> None:
        """Raises RuntimeError where there is not enough memory."""
        self.layout = layout
        self.num_blocks = num_blocks
        self._kernels = kernels
        shape = (layout.num_layers, 2, num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
        dtype = getattr(torch, layout.dtype)
        if device is None or device.torch_device.type == "cpu":
            self._data = _zeros(shape, dtype)  # [layers, 2, blocks, Hkv, block_size, D]
        else:
            self._data = torch.zeros(shape, dtype=dtype, device=device.torch_device)
        self._layers = [(layer[0], layer[1]) for layer in self._data]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, each [num_blocks, Hkv, block_size, D]."""
        return self._layers[index]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy block source to block destination in every layer, pair after pair."""
        self._kernels.copy_blocks(self._data, copies)

    def gather(
        self, layer_start: int, layer_end: int, block_ids: Sequence[int], token_start: int, token_end: int, out: memoryview
    ) -> int:
        """Copy the KV of a token range out of its blocks, and sum it up; `out` is [layers, 2, Hkv, tokens, D] in C order."""
        buffer = _as_tensor(out)
        return self._kernels.gather_tokens(self._data, layer_start, layer_end, block_ids, token_start, token_end, buffer)

    def checksum(self, data: memoryview) -> int:
        """What `gather` returned elsewhere, if these are the bytes that it wrote."""
        return self._kernels.wire_checksum(_as_tensor(data))

    def scatter(
        self, layer_start: int, layer_end: int, block_ids: Sequence[int], token_start: int, token_end: int, data: memoryview
    ) -> None:
        """Copy what `gather` wrote elsewhere into blocks here; no other token of them is touched."""
        self._kernels.scatter_tokens(self._data, layer_start, layer_end, block_ids, token_start, token_end, _as_tensor(data))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Touched at once, so that memory that is not there is noticed now and not in the middle of a request; in huge pages where
    the system has them, since blocks that lie anywhere would otherwise cost an address translation each."""
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"no memory: {error}") from error  # as torch's own allocator does
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()


def _as_tensor(buffer: memoryview) -> torch.Tensor:
    # torch has no read-only tensors and warns about read-only memory, so that is copied; the transports' rings are writable.
    return torch.frombuffer(bytearray(buffer) if buffer.readonly else buffer, dtype=torch.uint8)
