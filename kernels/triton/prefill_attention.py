"""Attention of prompts' new tokens over their cached prefix and themselves: a ragged batch, cut into tiles of query rows.

FlashAttention-2 (Dao 2023) over pages. A tile's rows are neighbouring tokens times the query heads of one kv head, so keys
are read once for all of them. Keys that every row sees are computed without a mask, apart from those at the edges.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import HOPPER, INTERPRETED, Launch, power_of_two, target_of

_LOG2_E = 1.4426950408889634
_BLACKWELL = 100


@dataclass(frozen=True)
class _Tiling:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptors: bool  # pages by the copy engine, a page at a time


@dataclass(frozen=True)
class PrefillBatch:
    """As `AttentionBatch`, and its tiles."""

    query_start_loc: torch.Tensor  # int32 [S + 1]
    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, max_blocks]
    tiles: torch.Tensor  # int32 [num_tiles, 2]: (sequence, its first query of the tile)


def tokens_per_tile(k_cache: torch.Tensor, num_heads: int, target: int = HOPPER) -> int:
    """What to plan a batch with."""
    return _tiling(k_cache, None, target).block_m // (num_heads // k_cache.shape[1])


def plan_prefill(query_lens: list[int], context_lens: list[int], num_tokens: int) -> torch.Tensor:
    """Tiles of `num_tokens` tokens, those with the most keys first: what starts last is soon done."""
    tiles = [
        (context_len - query_len + min(first + num_tokens, query_len), seq, first)
        for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
        for first in range(0, query_len, num_tokens)
    ]
    ordered = [tile[1:] for tile in sorted(tiles, reverse=True)]
    return torch.tensor(ordered, dtype=torch.int32).view(-1, 2)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PrefillBatch,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention` for q [T, Hq, D]; the batch's tiles are of `tokens_per_tile` tokens. What has no tile is not
    written to `out`, alike q."""
    out = torch.empty_like(q) if out is None else out
    prefill_launch(q, k_cache, v_cache, batch, scale, sliding_window, out, target_of(q.device)).run()
    return out.flatten(1)


def prefill_launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PrefillBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    target: int,
) -> Launch:
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    tiling = _tiling(k_cache, sliding_window, target)
    block_d = power_of_two(head_dim)
    arguments = {
        "q": q,
        "k_cache": _pages(k_cache, tiling, block_d),
        "v_cache": _pages(v_cache, tiling, block_d),
        "out": out,
        "tiles": batch.tiles,
        "query_start_loc": batch.query_start_loc,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "max_blocks": batch.block_tables.shape[1],
        "scale": scale * _LOG2_E,
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": block_size,
        "WINDOW": sliding_window or 0,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "USE_DESCRIPTORS": tiling.use_descriptors,
        "UPCAST": INTERPRETED,
    }
    return Launch(_attend_tile, (num_kv_heads, len(batch.tiles)), arguments, tiling.num_warps, tiling.num_stages)


def _pages(cache: torch.Tensor, tiling: _Tiling, block_d: int) -> Any:
    """The cache as rows [num_blocks * Hkv * block_size, D]: a page of a head is consecutive rows."""
    if not tiling.use_descriptors:
        return cache
    rows = cache.view(-1, cache.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tiling.block_n, block_d])


def _tiling(k_cache: torch.Tensor, window: int | None, target: int) -> _Tiling:
    """The largest tiles that leave no register spilled (the compile gate holds it), for two-byte types."""
    _, _, block_size, head_dim = k_cache.shape
    wide = power_of_two(head_dim) * k_cache.element_size() > 256
    block_m = 64 if wide else 128
    if target >= HOPPER and k_cache.element_size() == 2 and block_size % 64 == 0:
        whole_page = block_size % 128 == 0 and not wide and target < _BLACKWELL
        return _Tiling(block_m, 128 if whole_page else 64, num_warps=8, num_stages=3, use_descriptors=True)
    return _Tiling(block_m, 32 if wide or window else 64, num_warps=8, num_stages=5, use_descriptors=False)


@triton.jit
def _attend_tile(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    tiles: tl.tensor,
    query_start_loc: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    seq = tl.load(tiles + tl.program_id(1) * 2)
    first_query = tl.load(tiles + tl.program_id(1) * 2 + 1)
    query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    context_len = tl.load(context_lens + seq)
    num_queries = tl.minimum(TOKENS, query_len - first_query)
    first_position = context_len - query_len + first_query

    rows = tl.arange(0, BLOCK_M)  # (query, head of the group)
    dims = tl.arange(0, BLOCK_D)
    in_rows = (rows < num_queries * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = (query_start + first_query + rows // GROUP).to(tl.int64) * NUM_KV_HEADS + kv_head
    offsets = ((heads * GROUP + rows % GROUP) * HEAD_DIM)[:, None] + dims[None, :]
    queries = tl.load(q + offsets, mask=in_rows, other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        queries = queries.to(tl.float32)
    # Rows without a query see what the last one sees, so that no row is without keys.
    positions = first_position + tl.minimum(rows // GROUP, num_queries - 1)

    end_key = first_position + num_queries
    first_key = 0
    full_start = 0
    full_end = (first_position + 1) // BLOCK_N * BLOCK_N  # keys before it are before every row
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        full_start = tl.maximum(end_key - WINDOW + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
        if full_start >= full_end:  # no key is seen by every row: one masked loop has all of them
            full_start = end_key
            full_end = end_key
    table = block_tables + seq.to(tl.int64) * max_blocks
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The three calls differ in their keys and their mask alone.
    # fmt: off
    if WINDOW > 0:
        acc, largest, total = _attend_keys(
            acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, first_key, full_start, context_len,
            scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, True, USE_DESCRIPTORS, UPCAST,
        )
    acc, largest, total = _attend_keys(
        acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, full_start, full_end, context_len,
        scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, False, USE_DESCRIPTORS, UPCAST,
    )
    acc, largest, total = _attend_keys(
        acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, full_end, end_key, context_len,
        scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, True, USE_DESCRIPTORS, UPCAST,
    )
    # fmt: on
    tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=in_rows)


@triton.jit
def _attend_keys(
    acc: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    queries: tl.tensor,
    positions: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    start_key: tl.tensor,
    end_key: tl.tensor,
    context_len: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the keys [start_key, end_key) to a running softmax; `start_key` is a multiple of BLOCK_N."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(start_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_context = (keys < context_len)[:, None]
        if USE_DESCRIPTORS:
            page = tl.load(table + start // BLOCK_SIZE) * NUM_KV_HEADS + kv_head
            row = page * BLOCK_SIZE + start % BLOCK_SIZE
            k = k_cache.load([row, 0])  # [BLOCK_N, BLOCK_D]
            v = v_cache.load([row, 0])
            if MASKED:
                v = tl.where(in_context, v, 0.0)  # another sequence may have left a NaN behind the end
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < context_len, other=0).to(tl.int64)
            slots = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
            offsets = slots[:, None] * HEAD_DIM + dims[None, :]
            in_keys = in_context & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_cache + offsets, mask=in_keys, other=0.0)
            v = tl.load(v_cache + offsets, mask=in_keys, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        base = new_largest
        if MASKED and WINDOW > 0:
            base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return acc, largest, total
