"""Prefill attention in tiles equals the torch reference, whatever the cached prefix."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pdserve.kernels import AttentionBatch
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.prefill_attention import (
    PrefillBatch,
    prefill_attention,
    prefill_tile,
    prefill_workspace,
)
from pdserve.kernels.triton.prefill_plan import PrefillPlan, plan_prefill

from ..conftest import halves
from .support import DEVICE, assert_close_in_dtype, random_case

MIXED = ([33, 1, 70, 2], [33, 90, 200, 189], None)  # query lengths, context lengths, window
CASES = [  # query heads, kv heads, head_dim, block_size, batch
    (4, 2, 64, 64, MIXED),  # by descriptors
    (4, 2, 128, 128, MIXED),
    (7, 1, 64, 64, MIXED),  # a group that does not fill a tile
    (2, 2, 80, 64, MIXED),
    (2, 1, 256, 64, ([70], [200], None)),
    (4, 2, 64, 16, MIXED),  # by pointers
    (3, 1, 96, 24, MIXED),
    (5, 1, 128, 32, ([64], [64], None)),
    (4, 2, 64, 64, ([1, 70], [600, 640], 40)),
    (4, 2, 64, 16, ([20, 90], [400, 90], 330)),
    (4, 4, 64, 64, ([70], [200], 1)),
    (4, 2, 64, 16, ([100], [100], 100)),
]

BEHIND_PREFIXES = ([20, 1, 9], [640, 400, 9], None)
SPLIT_CASES = [
    (4, 2, 64, 64, BEHIND_PREFIXES),
    (2, 1, 128, 128, BEHIND_PREFIXES),
    (7, 1, 64, 16, BEHIND_PREFIXES),
    (2, 2, 80, 64, BEHIND_PREFIXES),
    (2, 1, 256, 64, ([40], [500], None)),
    (4, 2, 64, 64, ([40, 3], [1500, 640], 600)),  # rows that see no key of a piece
    (4, 2, 64, 16, ([90], [1200], 500)),
]


def attend(
    q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, window: int | None, num_programs: int
) -> tuple[torch.Tensor, PrefillPlan]:
    query_lens, context_lens = batch.query_start_loc.diff().tolist(), batch.context_lens.tolist()
    tile = prefill_tile(cache[0], q.shape[1], window)
    plan = plan_prefill(query_lens, context_lens, tile.num_tokens, tile.num_keys, num_programs, window)
    pieces, starts = (None if t is None else t.to(DEVICE) for t in (plan.pieces, plan.partial_start))
    there = PrefillPlan(plan.tiles.to(DEVICE), pieces, starts)
    starts, lens, tables = (
        t.to(DEVICE) for t in (batch.query_start_loc, batch.context_lens, batch.block_tables)
    )
    planned = PrefillBatch(starts, lens, tables, there)
    k_cache, v_cache = cache.to(DEVICE)
    workspace = prefill_workspace(there, k_cache)
    return prefill_attention(
        q.to(DEVICE), k_cache, v_cache, planned, workspace, q.shape[2] ** -0.5, window
    ), plan


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
    batch, q, cache = random_case(
        dtype, num_heads, num_kv_heads, head_dim, block_size, (query_lens, context_lens)
    )
    out, plan = attend(q, cache, batch, window, num_programs=1)
    assert plan.pieces is None
    exact = TorchKernels().paged_attention(q.double(), *halves(cache.double()), batch, head_dim**-0.5, window)
    assert_close_in_dtype(out, exact)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size", "lengths"), SPLIT_CASES)
def test_few_new_tokens_behind_a_long_prefix_split_its_keys(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    lengths: tuple[list[int], list[int], int | None],
) -> None:
    query_lens, context_lens, window = lengths
    batch, q, cache = random_case(
        torch.float32, num_heads, num_kv_heads, head_dim, block_size, (query_lens, context_lens)
    )
    out, plan = attend(q, cache, batch, window, num_programs=11)
    assert plan.pieces is not None and len(plan.pieces) > len(plan.tiles)
    exact = TorchKernels().paged_attention(q.double(), *halves(cache.double()), batch, head_dim**-0.5, window)
    assert_close_in_dtype(out, exact)


def test_each_query_is_in_one_tile_and_long_work_first() -> None:
    query_lens, context_lens = [300, 1, 64, 65], [300, 900, 1000, 70]
    tiles = plan_prefill(query_lens, context_lens, 32, 64, num_programs=1).tiles.tolist()
    covered = sorted(
        (seq, token) for seq, first in tiles for token in range(first, min(first + 32, query_lens[seq]))
    )
    assert covered == [(seq, token) for seq, length in enumerate(query_lens) for token in range(length)]
    ends = [context_lens[seq] - query_lens[seq] + min(first + 32, query_lens[seq]) for seq, first in tiles]
    assert ends == sorted(ends, reverse=True)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_tile_cover_its_visible_keys_and_run_together(data: st.DataObject) -> None:
    window = data.draw(st.sampled_from([None, 1, 100, 1000]))
    num_keys = data.draw(st.sampled_from([32, 64, 128]))
    num_programs = data.draw(st.integers(1, 40))
    context_lens = data.draw(st.lists(st.integers(1, 20_000), min_size=1, max_size=5))
    query_lens = [data.draw(st.integers(0, min(100, length))) for length in context_lens]
    plan = plan_prefill(query_lens, context_lens, 32, num_keys, num_programs, window)
    if plan.pieces is None:
        return
    assert plan.partial_start is not None
    assert len(plan.pieces) <= num_programs
    starts = plan.partial_start.tolist()
    for tile, (seq, first) in enumerate(plan.tiles.tolist()):
        pieces = plan.pieces[starts[tile] : starts[tile + 1]].tolist()
        position = context_lens[seq] - query_lens[seq] + first
        first_seen = 0 if window is None else max(0, position - window + 1)
        end = position + min(32, query_lens[seq] - first)
        assert {owner for owner, _, _ in pieces} == {tile}
        assert pieces[0][1] <= first_seen < pieces[0][2]
        assert [piece[2] for piece in pieces] == [*(piece[1] for piece in pieces[1:]), end]
        assert all(begin < stop and begin % num_keys == 0 for _, begin, stop in pieces)


def test_a_prefix_hit_fills_the_gpu() -> None:
    plan = plan_prefill([128], [8192], 32, 64, num_programs=132 // 8)
    assert plan.pieces is not None and len(plan.pieces) == 16
    sizes = (plan.pieces[:, 2] - plan.pieces[:, 1]).tolist()
    assert max(sizes) - min(sizes) <= 2 * 64


def test_a_short_prompt_is_not_split() -> None:
    assert plan_prefill([128], [128], 32, 64, num_programs=16).pieces is None
