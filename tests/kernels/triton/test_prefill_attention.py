"""Prefill attention in tiles computes what the torch reference computes at once, whatever was cached before."""

import pytest
import torch

from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.prefill_attention import PrefillBatch, plan_prefill, prefill_attention, tokens_per_tile

from ..conftest import halves
from .support import DEVICE, assert_close_in_dtype, random_case

MIXED = ([33, 1, 140, 2], [33, 90, 270, 253], None)  # query lengths, context lengths, window
CASES = [  # query heads, kv heads, head_dim, block_size, batch
    (4, 2, 64, 64, MIXED),  # by descriptors
    (4, 2, 128, 128, MIXED),
    (7, 1, 64, 64, MIXED),  # a group that does not fill a tile
    (2, 2, 80, 64, MIXED),
    (2, 1, 256, 64, ([70], [200], None)),
    (4, 2, 64, 16, MIXED),  # by pointers
    (3, 1, 96, 24, MIXED),
    (5, 1, 128, 32, ([64], [64], None)),
    (4, 2, 64, 64, ([1, 150], [600, 640], 40)),
    (4, 2, 64, 16, ([20, 150], [700, 150], 530)),
    (4, 4, 64, 64, ([130], [300], 1)),
    (4, 2, 64, 16, ([200], [200], 200)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size", "lengths"), CASES)
def test_prefill_attention(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    lengths: tuple[list[int], list[int], int | None],
) -> None:
    query_lens, context_lens, window = lengths
    batch, q, cache = random_case(dtype, num_heads, num_kv_heads, head_dim, block_size, (query_lens, context_lens))
    tiles = plan_prefill(query_lens, context_lens, tokens_per_tile(cache[0], num_heads))
    tiled = PrefillBatch(*(t.to(DEVICE) for t in (batch.query_start_loc, batch.context_lens, batch.block_tables, tiles)))
    out = prefill_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), tiled, head_dim**-0.5, window)
    exact = TorchKernels().paged_attention(q.double(), *halves(cache.double()), batch, head_dim**-0.5, window)
    assert_close_in_dtype(out, exact)


def test_a_plan_has_each_query_in_one_tile_and_the_longest_work_first() -> None:
    query_lens, context_lens = [300, 1, 64, 65], [300, 900, 1000, 70]
    tiles = plan_prefill(query_lens, context_lens, 32).tolist()
    covered = sorted((seq, token) for seq, first in tiles for token in range(first, min(first + 32, query_lens[seq])))
    assert covered == [(seq, token) for seq, length in enumerate(query_lens) for token in range(length)]
    ends = [context_lens[seq] - query_lens[seq] + min(first + 32, query_lens[seq]) for seq, first in tiles]
    assert ends == sorted(ends, reverse=True)
