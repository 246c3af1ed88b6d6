"""Attention of a few new tokens of each sequence (decode, or the check of a guess) over the paged cache.

Split-KV (FlashDecoding, Dao et al. 2023): a program reads one piece of one sequence's keys, for all query heads that share
a kv head, packed as the rows of one matrix product. Pieces of a split sequence leave partial results that a second kernel
merges; a sequence in one piece is written at once, and the second kernel has nothing to do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode_plan import DecodePlan, DecodeShape
from .launch import INTERPRETED, Launch, power_of_two

LOG2_E = 1.4426950408889634
_MERGE_BLOCK = 16


@dataclass(frozen=True)
class DecodeBatch:
    """As `AttentionBatch`, of at most `shape.max_seqs` sequences; those behind the plan's are not looked at."""

    query_start_loc: torch.Tensor  # int32 [max_seqs + 1]
    context_lens: torch.Tensor  # int32 [max_seqs]
    block_tables: torch.Tensor  # int32 [max_seqs, max_blocks]
    plan: DecodePlan


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where pieces leave their partial results: one for all layers, since they run one after the other."""

    outputs: torch.Tensor  # float32 [max_pieces, Hkv, rows, D]
    log_sums: torch.Tensor  # float32 [max_pieces, Hkv, rows]: log2 of the sum of exp2 of the scores


def decode_workspace(shape: DecodeShape, num_heads: int, head_dim: int, max_context_len: int, device: str) -> DecodeWorkspace:
    rows = num_heads // shape.num_kv_heads * shape.max_query_len
    lead = (shape.max_pieces(max_context_len), shape.num_kv_heads, rows)
    return DecodeWorkspace(torch.empty((*lead, head_dim), device=device), torch.empty(lead, device=device))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention` for q [T, Hq, D]; the plan's shape says the window. Sequences have 1 to 8 queries; of those
    that the plan leaves out nothing is written to `out`, alike q."""
    out = torch.empty_like(q) if out is None else out
    for launch in decode_launches(q, k_cache, v_cache, batch, workspace, scale, out):
        launch.run()
    return out.flatten(1)


def decode_launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor,
) -> list[Launch]:
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    shape = batch.plan.shape
    block_m = max(16, power_of_two(num_heads // num_kv_heads * shape.max_query_len))
    common = {
        "out": out,
        "partial_outputs": workspace.outputs,
        "partial_log_sums": workspace.log_sums,
        "query_start_loc": batch.query_start_loc,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "MAX_QUERY_LEN": shape.max_query_len,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
    }
    pieces = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "pieces": batch.plan.pieces,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "max_blocks": batch.block_tables.shape[1],
        "scale": scale * LOG2_E,
        "BLOCK_SIZE": block_size,
        "WINDOW": shape.window or 0,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if head_dim * q.element_size() <= 256 else 32,
        "UPCAST": INTERPRETED,
    }
    num_warps = 4 if block_m <= 32 else 8
    return [
        # Keys wait for their block's id: of five stages, two tiles of keys and values are in flight while one is computed.
        Launch(_attend_piece, (num_kv_heads, len(batch.plan.pieces)), common | pieces, num_warps, num_stages=5),
        Launch(
            _merge_pieces,
            (num_heads, shape.max_seqs * shape.max_query_len),
            common | {"partial_start": batch.plan.partial_start, "BLOCK_P": _MERGE_BLOCK},
            num_warps=2,
            num_stages=2,
        ),
    ]


@triton.jit
def _attend_piece(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    pieces: tl.tensor,
    query_start_loc: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = pieces + tl.program_id(1) * 4
    seq = tl.load(piece)
    if seq < 0:
        return
    first_key = tl.load(piece + 1)
    end_key = tl.load(piece + 2)
    partial = tl.load(piece + 3)
    query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    context_len = tl.load(context_lens + seq)
    table = block_tables + seq.to(tl.int64) * max_blocks

    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    rows = tl.arange(0, BLOCK_M)  # (query, head of the group)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    in_rows = (query < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    row_offsets = ((query_start + query).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    queries = tl.load(q + row_offsets[:, None] + dims[None, :], mask=in_rows, other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        queries = queries.to(tl.float32)
    last_key = context_len - query_len + query  # that a row sees

    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = (keys < end_key)[:, None] & (dims < HEAD_DIM)[None, :]
        if BLOCK_SIZE % BLOCK_N == 0:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            slots = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end_key, other=0).to(tl.int64)
            slots = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_cache + offsets, mask=in_keys, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_cache + offsets, mask=in_keys, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        visible = (keys < end_key)[None, :] & (keys[None, :] <= last_key[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > last_key[:, None] - WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet has -inf: it must not meet itself in a difference.
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if partial < 0:
        tl.store(out + row_offsets[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=in_rows)
    else:
        partial_rows = (partial.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP * MAX_QUERY_LEN + rows
        tl.store(partial_outputs + partial_rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=in_rows)
        tl.store(partial_log_sums + partial_rows, largest + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=query < query_len)


@triton.jit
def _merge_pieces(
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    partial_start: tl.tensor,
    query_start_loc: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1) // MAX_QUERY_LEN
    query = tl.program_id(1) % MAX_QUERY_LEN
    first = tl.load(partial_start + seq)
    end = tl.load(partial_start + seq + 1)
    if first == end:
        return
    query_start = tl.load(query_start_loc + seq)
    if query >= tl.load(query_start_loc + seq + 1) - query_start:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = query * GROUP + head % GROUP
    dims = tl.arange(0, BLOCK_D)
    largest = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        rows = (partials.to(tl.int64) * NUM_KV_HEADS + head // GROUP) * GROUP * MAX_QUERY_LEN + row
        log_sums = tl.load(partial_log_sums + rows, mask=partials < end, other=-float("inf"))
        in_rows = (partials < end)[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(partial_outputs + rows[:, None] * HEAD_DIM + dims[None, :], mask=in_rows, other=0.0)
        new_largest = tl.maximum(largest, tl.max(log_sums, 0))
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(log_sums - base)
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        largest = new_largest
    out_row = (query_start + query).to(tl.int64) * NUM_HEADS + head
    tl.store(out + out_row * HEAD_DIM + dims, (acc / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)
