"""Tokens leave one paged cache and arrive in another, whatever the block sizes of the two."""

from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pdserve.kernels import token_range_bytes
from pdserve.kernels.interface import heads_of
from pdserve.kernels.levels import LEVELS

from .conftest import make_subject

NAMES = [*LEVELS, "torch", "triton"]
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, NUM_BLOCKS = 3, 3, 8, 12


def _random_cache(block_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(NUM_LAYERS, 2, NUM_BLOCKS, NUM_KV_HEADS, block_size, HEAD_DIM).to(dtype)


def _tokens(cache: torch.Tensor, block_ids: list[int]) -> torch.Tensor:
    """Returns the sequence in `block_ids`: [layers, 2, Hkv, tokens, D]."""
    return cache[:, :, block_ids].transpose(2, 3).flatten(3, 4)


def _wire_checksum(buffer: torch.Tensor) -> int:
    """Computes the definition in `Kernels`, word by word."""
    total = 0
    for index, word in enumerate(array("Q", buffer.numpy().tobytes())):
        mixed = word ^ (index + 1) * 0x9E3779B185EBCA87 % 2**64
        total += word + (mixed & 0xFFFFFFFF) * (mixed >> 32)
    return total % 2**64


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_round_trip_moves_exactly_the_requested_tokens(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kernels, device = make_subject(name, torch.bfloat16)
    sizes = [data.draw(st.sampled_from([8, 16, 24, 32])) for _ in range(2)]
    token_end = data.draw(st.integers(1, 6 * min(sizes)))
    token_start = data.draw(st.integers(0, token_end - 1))
    layer_end = data.draw(st.integers(1, NUM_LAYERS))
    layer_start = data.draw(st.integers(0, layer_end - 1))
    blocks = [data.draw(st.permutations(range(NUM_BLOCKS)))[: -(-token_end // size)] for size in sizes]
    caches = [_random_cache(size, dtype).to(device) for size in sizes]
    # Triton's kernels take the heads as a part of the whole cache, see triton/test_transfer.py
    num_heads = data.draw(st.integers(1 if name != "triton" else NUM_KV_HEADS, NUM_KV_HEADS))
    firsts = [data.draw(st.integers(0, NUM_KV_HEADS - num_heads)) for _ in caches]
    sent, received = (
        heads_of(cache, range(first, first + num_heads)) for cache, first in zip(caches, firsts, strict=True)
    )

    buffer = torch.empty(
        token_range_bytes(sent, layer_end - layer_start, token_end - token_start), dtype=torch.uint8
    )
    checksum = kernels.gather_tokens(sent, layer_start, layer_end, blocks[0], token_start, token_end, buffer)
    assert checksum == kernels.wire_checksum(buffer) == _wire_checksum(buffer)
    expected = caches[1].clone()
    kernels.scatter_tokens(received, layer_start, layer_end, blocks[1], token_start, token_end, buffer)

    moved = _tokens(sent, blocks[0])[layer_start:layer_end, :, :, token_start:token_end]
    assert torch.equal(buffer.view(dtype), moved.cpu().flatten())
    for token in range(token_start, token_end):
        block, offset = blocks[1][token // sizes[1]], token % sizes[1]
        heads_of(expected, range(firsts[1], firsts[1] + num_heads))[
            layer_start:layer_end, :, block, :, offset
        ] = moved[:, :, :, token - token_start]
    assert torch.equal(caches[1], expected)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_checksum_detects_flipped_bits_swapped_words_and_zeroed_stretches(
    name: str, data: st.DataObject
) -> None:
    kernels = make_subject(name, torch.bfloat16).kernels
    num_words = data.draw(st.integers(2, 100))
    words = torch.tensor(
        data.draw(st.lists(st.integers(1, 2**63 - 1), min_size=num_words, max_size=num_words, unique=True))
    )
    start, end = sorted(data.draw(st.permutations(range(num_words)))[:2])
    flipped, swapped, zeroed = words.clone(), words.clone(), words.clone()
    flipped[start] ^= 1 << data.draw(st.integers(0, 62))
    swapped[[start, end]] = words[[end, start]]
    zeroed[start:end] = 0
    for version in (flipped, swapped, zeroed):
        assert kernels.wire_checksum(version.view(torch.uint8)) != kernels.wire_checksum(
            words.view(torch.uint8)
        )


@pytest.mark.parametrize("name", NAMES)
def test_copy_blocks_copies_every_layer_in_order(name: str) -> None:
    kernels, device = make_subject(name, torch.bfloat16)
    cache = _random_cache(16, torch.bfloat16).to(device)
    expected = cache.clone()
    expected[:, :, 5] = cache[:, :, 3]
    expected[:, :, 7] = cache[:, :, 3]
    kernels.copy_blocks(cache, [(3, 5), (5, 7)])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"layer_end": 4}, "layers"),
        ({"layer_start": 2, "layer_end": 2}, "layers"),
        ({"token_end": 33}, "tokens"),
        ({"token_start": 20}, "tokens"),
        ({"block_ids": [1, NUM_BLOCKS]}, "block_ids"),
        ({"block_ids": [1, -1]}, "block_ids"),
        ({"buffer": torch.empty(5, dtype=torch.uint8)}, "buffer"),
    ],
)
def test_a_transfer_outside_the_cache_or_buffer_is_refused(name: str, changed: dict, complaint: str) -> None:
    kernels, device = make_subject(name, torch.bfloat16)
    cache = _random_cache(16, torch.float32).to(device)
    buffer = torch.empty(token_range_bytes(cache, 2, 20), dtype=torch.uint8)
    good: dict[str, Any] = {
        "layer_start": 0,
        "layer_end": 2,
        "block_ids": [1, 2],
        "token_start": 0,
        "token_end": 20,
        "buffer": buffer,
    }
    for call in (kernels.gather_tokens, kernels.scatter_tokens):
        call(cache, **good)
        with pytest.raises(ValueError, match=complaint):
            call(cache, **(good | changed))
    with pytest.raises(ValueError, match="pairs"):
        kernels.copy_blocks(cache, [(0, NUM_BLOCKS)])
