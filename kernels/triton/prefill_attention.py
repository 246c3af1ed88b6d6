"""Attention of prompts' new tokens over their cached prefix and themselves: a ragged batch, cut into tiles of
query rows.

FlashAttention-2 (Dao 2023) over pages. A tile's rows are neighbouring tokens times the query heads of one kv
head, so keys are read once for all of them. Keys that every row sees are computed without a mask, apart from
those at the edges.

A few new tokens behind a long cached prefix make fewer tiles than a GPU has multiprocessors. Their keys are
shared out too: programs leave partial results, and a second kernel merges them."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import HOPPER, INTERPRETED, Launch, power_of_two, target_of
from .merge import merged, partials_at_a_time
from .prefill_plan import PrefillPlan

_MERGED_ROWS, _MERGE_WARPS = 8, 4  # of a merging program
_LOG2_E = 1.4426950408889634
_BLACKWELL = 100


@dataclass(frozen=True)
class _Tiling:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptors: bool  # pages by the copy engine, a page at a time
    max_registers: int | None = None


@dataclass(frozen=True)
class PrefillBatch:
    """The tensors of `AttentionBatch`, and its plan."""

    query_start_loc: torch.Tensor  # int32 [S + 1]
    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, max_blocks]
    plan: PrefillPlan


@dataclass(frozen=True)
class PrefillWorkspace:
    """The memory in which pieces of a plan that splits tiles leave their partial results: one for all
    layers."""

    outputs: torch.Tensor  # float32 [num_pieces, Hkv, rows of a tile, D]
    log_sums: torch.Tensor  # float32 [num_pieces, Hkv, rows of a tile]: log2 of the sum of exp2 of the scores


@dataclass(frozen=True)
class PrefillTile:
    """The parameters for planning a batch."""

    num_tokens: int
    num_keys: int  # read at a time


def prefill_tile(
    k_cache: torch.Tensor, num_heads: int, window: int | None, target: int = HOPPER
) -> PrefillTile:
    tiling = _tiling(k_cache, window, target)
    return PrefillTile(tiling.block_m // (num_heads // k_cache.shape[1]), tiling.block_n)


def prefill_workspace(
    plan: PrefillPlan, k_cache: torch.Tensor, target: int = HOPPER
) -> PrefillWorkspace | None:
    """Returns None where nothing is split."""
    if plan.pieces is None:
        return None
    lead = (len(plan.pieces), k_cache.shape[1], _tiling(k_cache, None, target).block_m)
    device = k_cache.device
    return PrefillWorkspace(
        torch.empty((*lead, k_cache.shape[3]), device=device), torch.empty(lead, device=device)
    )


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PrefillBatch,
    workspace: PrefillWorkspace | None,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention` for q [T, Hq, D]; the batch is planned with its `prefill_tile`. Rows without
    a tile are not written to `out`, shaped like q."""
    out = torch.empty_like(q) if out is None else out
    for launch in prefill_launches(
        q, k_cache, v_cache, batch, workspace, scale, sliding_window, out, target_of(q.device)
    ):
        launch.run()
    return out.flatten(1)


def prefill_launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PrefillBatch,
    workspace: PrefillWorkspace | None,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    target: int,
) -> list[Launch]:
    """The second launch, which needs only a workspace, merges."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    tiling = _tiling(k_cache, sliding_window, target, is_split=workspace is not None)
    block_d = power_of_two(head_dim)
    common = {
        "out": out,
        "partial_outputs": None if workspace is None else workspace.outputs,
        "partial_log_sums": None if workspace is None else workspace.log_sums,
        "tiles": batch.plan.tiles,
        "query_start_loc": batch.query_start_loc,
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiling.block_m,
    }
    arguments = {
        "q": q,
        "k_cache": _pages(k_cache, tiling, block_d),
        "v_cache": _pages(v_cache, tiling, block_d),
        "pieces": None if workspace is None else batch.plan.pieces,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "max_blocks": batch.block_tables.shape[1],
        "scale": scale * _LOG2_E,
        "BLOCK_SIZE": block_size,
        "WINDOW": sliding_window or 0,
        "BLOCK_N": tiling.block_n,
        "USE_DESCRIPTORS": tiling.use_descriptors,
        "SPLIT": workspace is not None,
        "UPCAST": INTERPRETED,
    }
    num_programs = len(batch.plan.tiles if batch.plan.pieces is None else batch.plan.pieces)
    attend = Launch(
        _attend_tile,
        (num_kv_heads, num_programs),
        common | arguments,
        tiling.num_warps,
        tiling.num_stages,
        tiling.max_registers or (None if workspace is None else 65_536 // (32 * tiling.num_warps) - 1),
    )
    if workspace is None:
        return [attend]
    merging = {
        "partial_start": batch.plan.partial_start,
        "BLOCK_R": _MERGED_ROWS,
        "BLOCK_P": partials_at_a_time(_MERGED_ROWS, block_d, _MERGE_WARPS),
    }
    grid = (num_kv_heads, len(batch.plan.tiles), tiling.block_m // _MERGED_ROWS)
    return [attend, Launch(_merge_tile, grid, common | merging, _MERGE_WARPS, num_stages=1)]


def _pages(cache: torch.Tensor, tiling: _Tiling, block_d: int) -> Any:
    """Returns the cache as rows [num_blocks * Hkv * block_size, D]: a page of a head is consecutive rows."""
    if not tiling.use_descriptors:
        return cache
    rows = cache.view(-1, cache.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tiling.block_n, block_d])


def _tiling(k_cache: torch.Tensor, window: int | None, target: int, is_split: bool = False) -> _Tiling:
    """Returns the largest tiles that leave no register spilled (the compile gate enforces it). Their sizes do
    not depend on `is_split`."""
    _, _, block_size, head_dim = k_cache.shape
    if (
        k_cache.element_size() == 4
    ):  # products without a matrix unit: sums and operands are all a thread's own
        return _Tiling(64, 16, num_warps=16, num_stages=2, use_descriptors=False, max_registers=128)
    wide = power_of_two(head_dim) * k_cache.element_size() > 256
    block_m = 64 if wide else 128
    if target >= HOPPER and block_size % 64 == 0:
        whole_page = block_size % 128 == 0 and not wide and target < _BLACKWELL
        return _Tiling(block_m, 128 if whole_page else 64, num_warps=8, num_stages=3, use_descriptors=True)
    block_n, num_stages = 32 if wide or window else 64, 4 if is_split and target < HOPPER else 5
    return _Tiling(block_m, block_n, num_warps=8, num_stages=num_stages, use_descriptors=False)


@triton.jit
def _attend_tile(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    tiles: tl.tensor,
    pieces: tl.tensor,
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
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    if SPLIT:
        tile = tl.load(pieces + tl.program_id(1) * 3)
    seq = tl.load(tiles + tile * 2)
    first_query = tl.load(tiles + tile * 2 + 1)
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
    # Rows without a query see the keys of the last one, so that no row is without keys.
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
    if SPLIT:  # all of them are multiples of BLOCK_N but the tile's end
        piece_start = tl.load(pieces + tl.program_id(1) * 3 + 1)
        piece_end = tl.load(pieces + tl.program_id(1) * 3 + 2)
        first_key = tl.maximum(first_key, piece_start)
        full_start = tl.minimum(tl.maximum(full_start, piece_start), piece_end)
        full_end = tl.minimum(tl.maximum(full_end, piece_start), piece_end)
        end_key = tl.minimum(end_key, piece_end)
    table = block_tables + seq.to(tl.int64) * max_blocks
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The three calls differ in their keys and their mask alone.
    # fmt: off
    if WINDOW > 0:
        acc, largest, total = _attend_keys(
            acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, first_key, full_start,
            context_len, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, True,
            USE_DESCRIPTORS, SPLIT, UPCAST,
        )
    acc, largest, total = _attend_keys(
        acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, full_start, full_end,
        context_len, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, False,
        USE_DESCRIPTORS, SPLIT, UPCAST,
    )
    acc, largest, total = _attend_keys(
        acc, largest, total, queries, positions, k_cache, v_cache, table, kv_head, full_end, end_key,
        context_len, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_N, True,
        USE_DESCRIPTORS, SPLIT, UPCAST,
    )
    # fmt: on
    if SPLIT:
        sums = tl.where(total > 0.0, total, 1.0)  # a row may see no key of a piece
        partial_rows = (tl.program_id(1).to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_M + rows
        tl.store(
            partial_outputs + partial_rows[:, None] * HEAD_DIM + dims[None, :],
            acc / sums[:, None],
            mask=in_rows,
        )
        tl.store(partial_log_sums + partial_rows, largest + tl.log2(sums), mask=rows < num_queries * GROUP)
    else:
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
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds the keys [start_key, end_key) to a running softmax; `start_key` is a multiple of BLOCK_N."""
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
        if MASKED and (WINDOW > 0 or SPLIT):  # a row may have seen no key yet
            base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return acc, largest, total


@triton.jit
def _merge_tile(
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    tiles: tl.tensor,
    partial_start: tl.tensor,
    query_start_loc: tl.tensor,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    seq = tl.load(tiles + tile * 2)
    first_query = tl.load(tiles + tile * 2 + 1)
    query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < tl.minimum(BLOCK_M // GROUP, query_len - first_query) * GROUP
    first = tl.load(partial_start + tile)
    end = tl.load(partial_start + tile + 1)
    # fmt: off
    values = merged(
        partial_outputs, partial_log_sums, first, end, kv_head, rows, in_rows,
        NUM_KV_HEADS, BLOCK_M, HEAD_DIM, BLOCK_R, BLOCK_D, BLOCK_P,
    )
    # fmt: on
    dims = tl.arange(0, BLOCK_D)
    heads = (query_start + first_query + rows // GROUP).to(tl.int64) * NUM_KV_HEADS + kv_head
    offsets = (heads * GROUP + rows % GROUP) * HEAD_DIM
    mask = in_rows[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + offsets[:, None] + dims[None, :], values.to(out.dtype.element_ty), mask=mask)
