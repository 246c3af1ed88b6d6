"""The KV memory of one device: one tensor of blocks. The model reads and writes it by layer, a transfer by
token range."""

import math
import mmap
from collections.abc import Sequence

import torch

from ..core.errors import ConfigError
from ..core.messages import KVLayout
from ..kernels import Kernels
from ..kernels.interface import heads_of
from ..kernels.wire import KVPart, WireFormat, movers
from .device import Device, HostDevice
from .on_gpu.kv_queue import KVQueue, Queued

Slot = torch.Tensor | memoryview  # slot of a link's ring: on the device, or in host memory
_ALL_BITS = 0xFFFFFFFFFFFFFFFF


class KVCache:
    """Allocated once at start. `BlockPool` tracks which block belongs to which sequence; this is the
    `KVStore` of transfers."""

    def __init__(
        self, layout: KVLayout, num_blocks: int, kernels: Kernels, device: Device | None = None
    ) -> None:
        """Without a device: in host memory. Raises RuntimeError where there is too little, ConfigError for a
        wire format that does not suit the model."""
        if layout.wire == "int8" and layout.head_dim % 8:
            raise ConfigError(
                f"kv.wire: got 'int8', expected 'raw' for a head_dim of {layout.head_dim}, no multiple of 8"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        self._kernels = kernels
        self._format = WireFormat(layout.wire)
        self._gather_part, self._scatter_part = movers(kernels)
        # Triton's kernels find heads in the whole cache
        self._moves_parts = self._format is WireFormat.INT8 or kernels.name == "triton"
        device = device or HostDevice()
        self.torch_device = device.torch_device
        shape = (layout.num_layers, 2, num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
        dtype = getattr(torch, layout.dtype)
        with torch.inference_mode(False):  # the transfer's thread writes to it outside of that mode
            self._data = _zeros(shape, dtype, device.torch_device)  # [layers, 2, blocks, Hkv, block_size, D]
        self._layers = [(layer[0], layer[1]) for layer in self._data]
        self._queue: KVQueue | None = None
        if device.runs_ahead:
            self._queue = KVQueue(self._data, device, self._format, self._gather_part, self._scatter_part)
            self._queue.warm_up()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the layer's keys and values, each [num_blocks, Hkv, block_size, D]."""
        return self._layers[index]

    def mark(self) -> int:
        """Names all work queued on the engine's current stream until now; 0 where nothing runs ahead."""
        return 0 if self._queue is None else self._queue.mark()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies block source to block destination in every layer, pair after pair."""
        self._kernels.copy_blocks(self._data, copies)

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
    ) -> int | Queued:
        """Copies the KV of a token range, of some of the cache's heads or of all, out of its blocks and
        returns its checksum; `out` is [layers, 2, heads, tokens, D] in C order, or the int8 format of
        `kernels.wire`. Runs behind the mark `after`."""
        part = self._part(layer_start, layer_end, token_start, token_end, heads)
        if self._queue is not None:
            return self._queue.gather(block_ids, part, out, after)
        buffer = _as_tensor(out)
        if self._moves_parts:
            return (
                int(self._gather_part(self._data, block_ids, part, buffer, self._format).item()) & _ALL_BITS
            )
        return self._kernels.gather_tokens(
            self._heads(heads), layer_start, layer_end, block_ids, token_start, token_end, buffer
        )

    def checksum(self, data: Slot) -> int | None:
        """Returns the checksum that `gather` returned elsewhere, if these are the bytes that it wrote. None
        on a device: there `scatter` reports it."""
        return None if self._queue is not None else self._kernels.wire_checksum(_as_tensor(data))

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
    ) -> Queued | None:
        """Copies bytes that `gather` wrote elsewhere into blocks here; touches no other token or head of
        them."""
        part = self._part(layer_start, layer_end, token_start, token_end, heads)
        if self._queue is not None:
            return self._queue.scatter(block_ids, part, data, after)
        buffer = _as_tensor(data)
        if self._moves_parts:
            self._scatter_part(self._data, block_ids, part, buffer, self._format)
        else:
            self._kernels.scatter_tokens(
                self._heads(heads), layer_start, layer_end, block_ids, token_start, token_end, buffer
            )
        return None

    def _part(
        self, layer_start: int, layer_end: int, token_start: int, token_end: int, heads: range | None
    ) -> KVPart:
        heads = range(self.layout.num_kv_heads) if heads is None else heads
        return KVPart(range(layer_start, layer_end), heads, range(token_start, token_end))

    def _heads(self, heads: range | None) -> torch.Tensor:
        return self._data if heads is None else heads_of(self._data, heads)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory is touched at once, so that a lack of it shows now and not in the middle of a request; it
    uses huge pages where the system has them, since scattered blocks would otherwise cost an address
    translation each."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"no memory: {error}") from error  # as torch's own allocator does
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()


def _as_tensor(buffer: Slot) -> torch.Tensor:
    if isinstance(buffer, torch.Tensor):
        return buffer
    # torch has no read-only tensors and warns about read-only memory, so that is copied; the transports'
    # rings are writable.
    return torch.frombuffer(bytearray(buffer) if buffer.readonly else buffer, dtype=torch.uint8)
