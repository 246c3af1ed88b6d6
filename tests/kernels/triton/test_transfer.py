"""Parts of a paged cache are sent and arrive in another cache exactly as by the torch reference."""

import pytest
import torch

from pdserve.kernels import wire
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton import transfer
from pdserve.kernels.wire import KVPart, WireFormat, part_bytes

from .support import DEVICE, assert_close_in_dtype

NUM_LAYERS, NUM_BLOCKS = 3, 9
WHOLE = KVPart(range(3), range(4), range(40))
CASES = [  # kv heads, head_dim, block sizes here and there, part
    (4, 64, (16, 16), WHOLE),
    (4, 64, (16, 64), KVPart(range(1, 3), range(1, 3), range(7, 90))),
    (2, 128, (64, 24), KVPart(range(1), range(1, 2), range(63, 66))),
    (3, 80, (24, 16), KVPart(range(2, 3), range(3), range(5, 6))),
]


def random_cache(dtype: torch.dtype, num_kv_heads: int, block_size: int, head_dim: int) -> torch.Tensor:
    sizes = torch.logspace(-3, 2, num_kv_heads)[:, None, None]  # heads differ by orders of magnitude
    return (torch.randn(NUM_LAYERS, 2, NUM_BLOCKS, num_kv_heads, block_size, head_dim) * sizes).to(dtype)


def random_blocks(part: KVPart, block_size: int) -> list[int]:
    return torch.randperm(NUM_BLOCKS)[: -(-part.tokens.stop // block_size)].tolist()


def empty_wire(cache: torch.Tensor, part: KVPart, wire_format: WireFormat) -> torch.Tensor:
    return torch.full((part_bytes(cache, part, wire_format),), 0xAA, dtype=torch.uint8)


@pytest.mark.parametrize("wire_format", list(WireFormat))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_sizes", "part"), CASES)
def test_a_part_is_moved_as_by_the_reference(
    wire_format: WireFormat,
    dtype: torch.dtype,
    num_kv_heads: int,
    head_dim: int,
    block_sizes: tuple[int, int],
    part: KVPart,
) -> None:
    here, there = (random_cache(dtype, num_kv_heads, block_size, head_dim) for block_size in block_sizes)
    blocks = [random_blocks(part, block_size) for block_size in block_sizes]
    expected_wire = empty_wire(here, part, wire_format)
    wire.gather_part(here, blocks[0], part, expected_wire, wire_format)
    buffer = empty_wire(here, part, wire_format).to(DEVICE)
    total = transfer.gather_part(here.to(DEVICE), blocks[0], part, buffer, wire_format)
    assert_same_wire(buffer.cpu(), expected_wire, wire_format, part.num_rows * 2 * head_dim)
    assert total.tolist() == wire.checksum(buffer.cpu()).tolist() == transfer.checksum(buffer).tolist()

    arrived = there.clone().to(DEVICE)
    assert transfer.scatter_part(arrived, blocks[1], part, buffer, wire_format).tolist() == total.tolist()
    wire.scatter_part(there, blocks[1], part, buffer.cpu(), wire_format)
    if wire_format is WireFormat.RAW:
        assert torch.equal(arrived.cpu(), there)
    else:
        assert_close_in_dtype(arrived, there.double())


def assert_same_wire(
    actual: torch.Tensor, expected: torch.Tensor, wire_format: WireFormat, num_values: int
) -> None:
    """A GPU may round a value half-way between two int8 steps to the other."""
    if wire_format is WireFormat.RAW or DEVICE == "cpu":
        assert torch.equal(actual, expected)
        return
    assert torch.equal(actual[num_values:], expected[num_values:])
    steps = (part[:num_values].view(torch.int8).int() for part in (actual, expected))
    assert (next(steps) - next(steps)).abs().max() <= 1


def test_the_raw_wire_of_all_heads_equals_the_cpu_kernels() -> None:
    cache = random_cache(torch.bfloat16, 4, 16, 64)
    blocks = random_blocks(WHOLE, 16)
    expected, buffer = (
        empty_wire(cache, WHOLE, WireFormat.RAW),
        empty_wire(cache, WHOLE, WireFormat.RAW).to(DEVICE),
    )
    checksum = TorchKernels().gather_tokens(cache, 0, 3, blocks, 0, 40, expected)
    total = transfer.gather_part(cache.to(DEVICE), blocks, WHOLE, buffer, WireFormat.RAW)
    assert torch.equal(buffer.cpu(), expected)
    assert total.item() % 2**64 == checksum


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    part = KVPart(range(2), range(4), range(3, 60))
    cache = random_cache(torch.float32, 4, 16, 64)
    blocks = random_blocks(part, 16)
    buffer = empty_wire(cache, part, WireFormat.INT8).to(DEVICE)
    transfer.gather_part(cache.to(DEVICE), blocks, part, buffer, WireFormat.INT8)
    arrived = cache.clone().to(DEVICE)
    transfer.scatter_part(arrived, blocks, part, buffer, WireFormat.INT8)
    steps = cache.abs().amax(-1, keepdim=True) / 127
    assert ((arrived.cpu() - cache).abs() <= 0.501 * steps).all()
    assert not torch.equal(arrived.cpu(), cache)


def test_non_finite_int8_rows_arrive_as_nan_and_tiny_ones_as_zeros() -> None:
    part = KVPart(range(1), range(1), range(5))
    cache = torch.ones(1, 2, 1, 1, 8, 8)
    cache[0, 0, 0, 0, 0, 3], cache[0, 1, 0, 0, 1, 7] = torch.inf, torch.nan
    cache[0, 0, 0, 0, 2] = 1e-36
    buffer = empty_wire(cache, part, WireFormat.INT8).to(DEVICE)
    transfer.gather_part(cache.to(DEVICE), [0], part, buffer, WireFormat.INT8)
    arrived = cache.clone().to(DEVICE)
    transfer.scatter_part(arrived, [0], part, buffer, WireFormat.INT8)
    expected = torch.ones(1, 2, 1, 1, 8, 8)
    expected[0, 0, 0, 0, 0], expected[0, 1, 0, 0, 1], expected[0, 0, 0, 0, 2] = torch.nan, torch.nan, 0.0
    assert torch.allclose(arrived.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("wire_format", list(WireFormat))
def test_a_checksum_detects_swapped_and_zeroed_words_and_flipped_bits(wire_format: WireFormat) -> None:
    part = KVPart(range(1), range(2), range(9))
    cache = random_cache(torch.bfloat16, 2, 16, 64).to(DEVICE)
    buffer = empty_wire(cache, part, wire_format).to(DEVICE)
    total = transfer.gather_part(cache, [4], part, buffer, wire_format)
    for first, second in ((0, 1), (3, -1), (-2, -1)):  # the last words of the int8 wire are scales
        swapped, zeroed, flipped = buffer.clone(), buffer.clone(), buffer.clone()
        swapped.view(torch.int64)[[first, second]] = buffer.view(torch.int64)[[second, first]]
        zeroed.view(torch.int64)[first] = 0
        flipped[8 * second] ^= 1
        for corrupt in (swapped, zeroed, flipped):
            assert transfer.checksum(corrupt).item() != total.item()
            assert (
                transfer.scatter_part(cache.clone(), [4], part, corrupt, wire_format).item() != total.item()
            )


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"part": KVPart(range(4), range(2), range(20))}, "layers:"),
        ({"part": KVPart(range(2), range(1, 3), range(20))}, "heads:"),
        ({"part": KVPart(range(2), range(0), range(20))}, "heads:"),
        ({"part": KVPart(range(2), range(2), range(33))}, "tokens:"),
        ({"part": KVPart(range(2), range(2), range(0, 20, 2))}, "tokens:"),
        ({"block_ids": [1, NUM_BLOCKS]}, "block_ids:"),
        ({"buffer": torch.empty(5, dtype=torch.uint8)}, "buffer:"),
    ],
)
def test_a_part_outside_the_cache_or_the_buffer_is_refused(changed: dict, complaint: str) -> None:
    cache = random_cache(torch.float32, 2, 16, 64)
    part = KVPart(range(2), range(2), range(20))
    good = {"block_ids": [1, 2], "part": part, "buffer": empty_wire(cache, part, WireFormat.RAW)}
    for call in (transfer.gather_part, transfer.scatter_part, wire.gather_part, wire.scatter_part):
        with pytest.raises(ValueError, match=complaint):
            call(cache, **(good | changed), wire_format=WireFormat.RAW)
