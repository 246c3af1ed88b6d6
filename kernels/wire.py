"""A part of a sequence's KV on the wire: its cells, its format, and the definition of gathering and
scattering it.

The raw format is `Kernels.gather_tokens`' with fewer heads: [layers, 2, heads, tokens, D] in the cache's
dtype. The int8 format about halves a bfloat16 cache's: int8 [layers, 2, heads, tokens, D], then float32
[layers, heads, tokens, 2]: a scale for each row of D keys, and of D values. A scale for each row and not for
a chunk, so that one large key costs no other token its precision, and the received values do not depend on
how the transfer was cut. int8 rather than e4m3: it is off by 1/254 of the row's largest value at most, where
e4m3 is off by 1/16 of each value, and a GPU need not know 8-bit floats."""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .interface import Kernels, check_buffer, check_cells
from .reference import TorchKernels

INT8_STEPS = 127  # from 0 to a row's largest value
SMALLEST_ROW = 1e-30  # rows below it travel as zeros: the reciprocal of their scale would overflow
_SCALES_BYTES = 8  # of a key's and a value's row: whole words, as the checksum is of words


class WireFormat(enum.Enum):
    RAW = "raw"
    INT8 = "int8"


# (cache, block_ids, part, buffer, wire_format) -> the buffer's checksum, int64 [1], where the buffer is
MovePart = Callable[[torch.Tensor, Sequence[int], "KVPart", torch.Tensor, WireFormat], torch.Tensor]


class KVPart(NamedTuple):
    """Layers, kv heads and tokens of one sequence; heads are counted as in the cache at hand."""

    layers: range
    heads: range
    tokens: range

    @property
    def num_rows(self) -> int:
        """Returns the number of (layer, head, token) cells, each with a row of keys and one of values."""
        return len(self.layers) * len(self.heads) * len(self.tokens)


def part_bytes(cache: torch.Tensor, part: KVPart, wire_format: WireFormat) -> int:
    """Returns the number of bytes on the wire."""
    head_dim = cache.shape[-1]
    if wire_format is WireFormat.RAW:
        return part.num_rows * 2 * head_dim * cache.element_size()
    return part.num_rows * (2 * head_dim + _SCALES_BYTES)


def check_part(
    cache: torch.Tensor, block_ids: Sequence[int], part: KVPart, buffer: torch.Tensor, wire_format: WireFormat
) -> None:
    """Refuses a transfer that would touch memory outside the cache or the buffer."""
    _, _, _, num_kv_heads, _, head_dim = cache.shape
    if head_dim % 8 or not cache.is_contiguous():
        raise ValueError(f"cache: head_dim {head_dim} given, expected a multiple of 8, contiguous")
    for name, given in zip(part._fields, part, strict=True):
        if given.step != 1:
            raise ValueError(f"{name}: {given} given, expected neighbours")
    check_cells(cache, part.layers.start, part.layers.stop, block_ids, part.tokens.start, part.tokens.stop)
    if not 0 <= part.heads.start < part.heads.stop <= num_kv_heads:
        raise ValueError(
            f"heads: [{part.heads.start}, {part.heads.stop}) is not within the cache's {num_kv_heads} heads"
        )
    check_buffer(buffer, part_bytes(cache, part, wire_format))


def gather_part(
    cache: torch.Tensor, block_ids: Sequence[int], part: KVPart, buffer: torch.Tensor, wire_format: WireFormat
) -> torch.Tensor:
    """Copies a part of the sequence stored in `block_ids` to `buffer`, uint8 [`part_bytes`].

    Returns `checksum` of the buffer. In the int8 format a row with a value that is not finite arrives
    entirely as NaN."""
    check_part(cache, block_ids, part, buffer, wire_format)
    rows = cache[_cells(cache, block_ids, part)].permute(1, 2, 3, 0, 4)  # [layers, 2, heads, tokens, D]
    if wire_format is WireFormat.RAW:
        buffer.copy_(rows.contiguous().view(torch.uint8).flatten())
        return checksum(buffer)
    wide = rows.float()
    largest = torch.where(wide.isfinite(), wide.abs(), torch.inf).amax(-1, keepdim=True)
    spoilt, empty = largest.isinf(), largest < SMALLEST_ROW
    scales = torch.where(spoilt, torch.nan, torch.where(empty, 0.0, largest / INT8_STEPS))
    # A tensor over a tensor: torch takes a number over a tensor by the reciprocal, which rounds twice.
    inverse = torch.where(spoilt | empty, 0.0, torch.full_like(largest, INT8_STEPS) / largest)
    steps = (torch.where(spoilt, 0.0, wide) * inverse + 0.5).floor().to(torch.int8)
    values, in_rows = _split(buffer, cache, part)
    values.copy_(steps.view(torch.uint8).flatten())
    in_rows.copy_(scales.squeeze(-1).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten())
    return checksum(buffer)


def scatter_part(
    cache: torch.Tensor, block_ids: Sequence[int], part: KVPart, buffer: torch.Tensor, wire_format: WireFormat
) -> torch.Tensor:
    """The inverse of `gather_part`: writes no slot, layer or head outside the part; returns `checksum` of the
    bytes that it read."""
    check_part(cache, block_ids, part, buffer, wire_format)
    shape = (len(part.layers), 2, len(part.heads), len(part.tokens), cache.shape[-1])
    if wire_format is WireFormat.RAW:
        rows = buffer.view(cache.dtype).view(shape)
    else:
        values, in_rows = _split(buffer, cache, part)
        scales = in_rows.view(torch.float32).view(shape[0], *shape[2:4], 2).permute(0, 3, 1, 2)
        rows = (values.view(torch.int8).view(shape).float() * scales[..., None]).to(cache.dtype)
    cache[_cells(cache, block_ids, part)] = rows.permute(3, 0, 1, 2, 4)
    return checksum(buffer)


def movers(kernels: Kernels) -> tuple[MovePart, MovePart]:
    """Returns `gather_part` and `scatter_part` where these kernels' tensors are; beside native kernels,
    torch's."""
    if kernels.name != "triton":
        return gather_part, scatter_part
    from .triton import transfer

    return transfer.gather_part, transfer.scatter_part


def checksum(buffer: torch.Tensor) -> torch.Tensor:
    """Returns `Kernels.wire_checksum`'s bits as int64 [1], where the buffer is: they can be awaited with
    other work."""
    unsigned = TorchKernels().wire_checksum(buffer)
    return torch.tensor([unsigned - 2**64 if unsigned >= 2**63 else unsigned])


def _cells(cache: torch.Tensor, block_ids: Sequence[int], part: KVPart) -> tuple[slice | torch.Tensor, ...]:
    """Returns the cache's index of the part; advanced indices around slices put the token axis first."""
    block_size = cache.shape[4]
    tokens = torch.arange(part.tokens.start, part.tokens.stop)
    blocks = torch.tensor(block_ids, dtype=torch.int64)[tokens // block_size]
    layers, heads = slice(part.layers.start, part.layers.stop), slice(part.heads.start, part.heads.stop)
    return layers, slice(None), blocks, heads, tokens % block_size


def _split(buffer: torch.Tensor, cache: torch.Tensor, part: KVPart) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an int8 buffer's (values, scales), as bytes."""
    num_values = part.num_rows * 2 * cache.shape[-1]
    return buffer[:num_values], buffer[num_values:]
