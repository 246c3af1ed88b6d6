"""Ranks' own KV caches, by the kernels that serve: heads arrive where they are held, in each wire format."""

from contextlib import ExitStack
from typing import Literal

import pytest
import torch

from pdserve.core.messages import KVLayout
from pdserve.core.request import TransferId
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels import KernelRequirements, Kernels, load_kernels
from pdserve.kernels.reference import TorchKernels
from pdserve.kv_transfer.parts import Share

from .instances import Instance
from .support import ArrayStore

T = TransferId("request", 0)
NUM_BLOCKS = 16


class WritableCache(KVCache):
    """A cache that a `Recorder` can name blocks of."""

    writable: set[int]


class CacheInstance(Instance):
    """An instance whose ranks hold caches, of which one with a seed is random."""

    def __init__(
        self, name: str, kv_layout: KVLayout, num_ranks: int, kernels: Kernels, seed: int | None = None
    ) -> None:
        self._kernels, self._seed = kernels, seed
        self.caches: list[WritableCache] = []
        super().__init__(name, kv_layout, num_ranks, num_blocks=NUM_BLOCKS)

    def _store(self, whole: ArrayStore, share: Share) -> WritableCache:  # type: ignore[override]
        cache = WritableCache(self.held(share), NUM_BLOCKS, self._kernels)
        cache.writable = whole.writable
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed)
            layers, two, blocks, _, *rest = cache._data.shape
            everything = torch.randn(layers, two, blocks, share.num_kv_heads, *rest, generator=generator)
            cache._data.copy_(everything[:, :, :, share.heads.start : share.heads.stop])
        self.caches.append(cache)
        return cache

    def tokens(self, block_ids: list[int], num_tokens: int) -> torch.Tensor:
        """Returns [layers, 2, heads of all ranks, tokens, D] as float32."""
        parts = [cache._data[:, :, block_ids].transpose(2, 3).flatten(3, 4) for cache in self.caches]
        return torch.cat(parts, dim=2)[..., :num_tokens, :].float()


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize("ranks", [(1, 4), (2, 4), (4, 1), (2, 2)])
def test_heads_of_caches_arrive_where_they_are_held(
    ranks: tuple[int, int], kind: str, wire: Literal["raw", "int8"]
) -> None:
    required = KernelRequirements(torch.bfloat16, 16, 8)
    kernels = TorchKernels() if kind == "torch" else load_kernels("cpu", required, "auto", 1)
    layouts = [KVLayout(2, 4, 16, "bfloat16", block_size, "m", wire) for block_size in (8, 16)]
    with ExitStack() as stack:
        sender = CacheInstance("p", layouts[0], ranks[0], kernels, seed=1)
        stack.callback(sender.close)
        receiver = CacheInstance("d", layouts[1], ranks[1], kernels)
        stack.callback(receiver.close)
        receiver.expect(T, sender, [7, 3, 11], 45)
        sender.push(T, receiver, [9, 2, 5, 4, 1, 8], 45)
        receiver.ends.received(T)
        sender.ends.sent(T)
        sent, arrived = sender.tokens([9, 2, 5, 4, 1, 8], 45), receiver.tokens([7, 3, 11], 45)
        torch.testing.assert_close(arrived, sent, atol=0.0 if wire == "raw" else 0.05, rtol=0.0)
