"""KVCache: a transfer moves KV from one cache to another, even with another block size."""

from typing import Literal

import msgspec
import pytest
import torch

from pdserve.core.messages import KVLayout
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels import KernelRequirements, Kernels, load_kernels
from pdserve.kernels.reference import TorchKernels

KERNELS = [TorchKernels(), load_kernels("cpu", KernelRequirements(torch.bfloat16, 8, 8), "auto", 1)]


def make_cache(block_size: int = 8, dtype: str = "float32", num_blocks: int = 12) -> KVCache:
    return KVCache(KVLayout(3, 2, 8, dtype, block_size, "model"), num_blocks, TorchKernels())


def fill(cache: KVCache, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index in range(cache.layout.num_layers):
        for part in cache.layer(index):
            part.copy_(torch.randn(part.shape, generator=generator))


def tokens(cache: KVCache, layer: int, block_ids: list[int]) -> torch.Tensor:
    """[2, Hkv, tokens, D] of a sequence in one layer."""
    return torch.stack([part[block_ids].transpose(0, 1).flatten(1, 2) for part in cache.layer(layer)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target_block_size", [8, 16, 32])
def test_kv_moves_between_caches_of_different_block_sizes(dtype: str, target_block_size: int) -> None:
    source, target = make_cache(8, dtype), make_cache(target_block_size, dtype)
    fill(source, 1)
    source_blocks, target_blocks = [5, 0, 7, 2], [3, 9, 1, 4][: 32 // target_block_size]
    for layers in ((0, 2), (2, 3)):
        for start, end in ((0, 5), (5, 24), (24, 27)):
            num_bytes = (layers[1] - layers[0]) * (end - start) * source.layout.bytes_per_token // 3
            wire = bytearray(num_bytes)
            source.gather(*layers, source_blocks, start, end, memoryview(wire))
            target.scatter(*layers, target_blocks, start, end, memoryview(wire))
    for layer in range(3):
        moved = tokens(target, layer, target_blocks)
        assert torch.equal(moved[:, :, :27], tokens(source, layer, source_blocks)[:, :, :27])
        assert not moved[:, :, 27:].any()


@pytest.mark.parametrize("kernels", KERNELS, ids=["torch", "cpu"])
@pytest.mark.parametrize("wire", ["raw", "int8"])
def test_some_heads_move_and_the_others_stay(kernels: Kernels, wire: Literal["raw", "int8"]) -> None:
    layouts = [KVLayout(3, num_heads, 8, "bfloat16", 8, "model", wire) for num_heads in (4, 2)]
    source, target = (KVCache(layout, 12, kernels) for layout in layouts)
    fill(source, 1)
    fill(target, 2)
    before = [tokens(target, layer, [3, 9]) for layer in range(3)]
    part = msgspec.structs.replace(layouts[0], num_kv_heads=1)
    data = bytearray(3 * 13 * part.wire_bytes_per_cell)
    source.gather(0, 3, [5, 0], 1, 14, memoryview(data), heads=range(2, 3))
    target.scatter(0, 3, [3, 9], 1, 14, memoryview(data), heads=range(1, 2))
    for layer in range(3):
        moved, sent = tokens(target, layer, [3, 9]), tokens(source, layer, [5, 0])
        torch.testing.assert_close(moved[:, 1, 1:14], sent[:, 2, 1:14], atol=0.05, rtol=0)
        assert torch.equal(moved[:, 0], before[layer][:, 0])
        assert torch.equal(moved[:, 1, 14:], before[layer][:, 1, 14:])
    with pytest.raises(ValueError, match="heads"):
        source.gather(0, 3, [5, 0], 1, 14, memoryview(data), heads=range(4, 5))


def test_data_may_be_read_only_memory() -> None:
    source, target = make_cache(), make_cache()
    fill(source, 2)
    wire = bytearray(4 * source.layout.bytes_per_token)
    source.gather(0, 3, [1], 2, 6, memoryview(wire))
    target.scatter(0, 3, [1], 2, 6, memoryview(bytes(wire)))
    assert torch.equal(tokens(target, 1, [1])[:, :, 2:6], tokens(source, 1, [1])[:, :, 2:6])


def test_copies_are_made_in_order() -> None:
    cache = make_cache()
    fill(cache, 3)
    before = [[part.clone() for part in cache.layer(index)] for index in range(3)]
    cache.copy_blocks(((0, 1), (1, 2), (5, 1)))
    for index in range(3):
        for part, old in zip(cache.layer(index), before[index], strict=True):
            assert (
                torch.equal(part[2], old[0]) and torch.equal(part[1], old[5]) and torch.equal(part[0], old[0])
            )
