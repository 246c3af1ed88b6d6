"""Parts of a cache on their way to the wire and back, beside the reference: bytes, checksums and what
arrives."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from pdserve.kernels import wire
from pdserve.kernels.triton import transfer
from pdserve.kernels.wire import KVPart, WireFormat, part_bytes

from .batches import num_different, row_error
from .cases import Case

_DTYPE = torch.bfloat16


def cases(device: str, is_toy: bool) -> Iterator[Case]:
    """Pages of 64 are sent and arrive in pages of 16; a part begins and ends within a page."""
    heads = (2, 64) if is_toy else (8, 128)
    part = (
        KVPart(range(1, 3), range(1, 2), range(7, 90))
        if is_toy
        else KVPart(range(1, 4), range(8), range(100, 1000))
    )
    for wire_format in WireFormat:
        # An int8 step half-way between two may be rounded to the other: that moves a value by one in 127 of
        # its row's largest.
        tolerance = 0.0 if wire_format is WireFormat.RAW else 2e-2
        name = (
            f"gather, checksum and scatter, {wire_format.value}, {heads[0]} heads of {heads[1]},"
            f" {len(part.tokens)} tokens"
        )
        yield Case(name, tolerance, partial(_error, wire_format, heads, part, device))


def _error(wire_format: WireFormat, heads: tuple[int, int], part: KVPart, device: str) -> float:
    """The error of received data against the reference; infinite where bytes or checksums are wrong."""
    num_kv_heads, head_dim = heads
    here, there = (_cache(part, num_kv_heads, block_size, head_dim) for block_size in (64, 16))
    sent, arriving = (
        torch.randperm(cache.shape[2])[: cache.shape[2] - 1].tolist() for cache in (here, there)
    )
    expected = torch.full((part_bytes(here, part, wire_format),), 0xAA, dtype=torch.uint8)
    buffer = expected.clone().to(device)
    wire.gather_part(here, sent, part, expected, wire_format)
    total = transfer.gather_part(here.to(device), sent, part, buffer, wire_format)
    sums = [wire.checksum(buffer.cpu()), transfer.checksum(buffer).cpu()]
    arrived = there.clone().to(device)
    sums.append(transfer.scatter_part(arrived, arriving, part, buffer, wire_format).cpu())
    if any(int(each) != int(total) for each in sums) or _wrong_bytes(
        buffer.cpu(), expected, wire_format, part, head_dim
    ):
        return math.inf
    wire.scatter_part(there, arriving, part, buffer.cpu(), wire_format)
    if wire_format is WireFormat.RAW:
        return num_different(arrived, there)
    return row_error(arrived, there)


def _wrong_bytes(
    actual: torch.Tensor, expected: torch.Tensor, wire_format: WireFormat, part: KVPart, head_dim: int
) -> bool:
    if wire_format is WireFormat.RAW:
        return bool(num_different(actual, expected))
    num_values = part.num_rows * 2 * head_dim
    steps = [tensor[:num_values].view(torch.int8).int() for tensor in (actual, expected)]
    return (
        bool(num_different(actual[num_values:], expected[num_values:]))
        or int((steps[0] - steps[1]).abs().max()) > 1
    )


def _cache(part: KVPart, num_kv_heads: int, block_size: int, head_dim: int) -> torch.Tensor:
    """Heads differ by orders of magnitude."""
    num_blocks = -(-part.tokens.stop // block_size) + 1
    sizes = torch.logspace(-3, 2, num_kv_heads)[:, None, None]
    return (torch.randn(part.layers.stop, 2, num_blocks, num_kv_heads, block_size, head_dim) * sizes).to(
        _DTYPE
    )
