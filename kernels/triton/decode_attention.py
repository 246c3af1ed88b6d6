"""Attention of a few new tokens of each sequence (decode, or the check of a guess) over the paged cache.

Split-KV (FlashDecoding, Dao et al. 2023): a program reads one piece of one sequence's keys at a time, for all
query heads that share a kv head, packed as the rows of one matrix product. A sequence in one piece is written
at once. Pieces of a split sequence leave partial results, which the program that finishes the last of them
merges: it is found by counting arrivals, so that no second kernel is launched, and the result does not depend
on which program it is.

A captured graph's grid is that of its largest plan. Where most of it would be idle, a wave of n programs
takes the pieces in turn, every n-th (`DecodeShape.takes_turns`); the loop costs registers."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode_plan import DecodePlan, DecodeShape
from .launch import INTERPRETED, Launch, power_of_two
from .merge import merged, partials_at_a_time

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeBatch:
    """The tensors of `AttentionBatch`, for at most `shape.max_seqs` sequences; those beyond the plan's are
    not read."""

    query_start_loc: torch.Tensor  # int32 [max_seqs + 1]
    context_lens: torch.Tensor  # int32 [max_seqs]
    block_tables: torch.Tensor  # int32 [max_seqs, max_blocks]
    plan: DecodePlan


@dataclass(frozen=True)
class DecodeWorkspace:
    """The memory in which pieces leave and count their partial results: one for all layers, since they run
    one after the other."""

    outputs: torch.Tensor  # float32 [max_pieces, Hkv, rows, D]
    log_sums: torch.Tensor  # float32 [max_pieces, Hkv, rows]: log2 of the sum of exp2 of the scores
    arrivals: (
        torch.Tensor
    )  # int32 [max_seqs, Hkv]: finished pieces of split sequences; zeros before and after each launch


def decode_workspace(
    shape: DecodeShape, num_heads: int, head_dim: int, max_context_len: int, device: str
) -> DecodeWorkspace:
    rows = num_heads // shape.num_kv_heads * shape.max_query_len
    lead = (shape.max_pieces(max_context_len), shape.num_kv_heads, rows)
    arrivals = torch.zeros((shape.max_seqs, shape.num_kv_heads), dtype=torch.int32, device=device)
    return DecodeWorkspace(
        torch.empty((*lead, head_dim), device=device), torch.empty(lead, device=device), arrivals
    )


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention` for q [T, Hq, D]; the plan's shape states the window. Sequences have 1 to 8
    queries; for those that the plan leaves out nothing is written to `out`, shaped like q."""
    out = torch.empty_like(q) if out is None else out
    decode_launch(q, k_cache, v_cache, batch, workspace, scale, out).run()
    return out.flatten(1)


def decode_launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor,
) -> Launch:
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    shape, num_pieces = batch.plan.shape, len(batch.plan.pieces)
    num_programs = shape.num_programs(num_pieces)
    rows = num_heads // num_kv_heads * shape.max_query_len
    block_m, block_d = max(16, power_of_two(rows)), power_of_two(head_dim)
    num_warps = 4 if block_m <= 32 and q.element_size() == 2 else 8
    if q.element_size() == 4:  # products without a matrix unit take registers
        block_n = 16 if block_m * block_d >= 2048 else 32
    else:
        block_n = 64 if head_dim <= 128 else 32
    arguments = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "out": out,
        "partial_outputs": workspace.outputs,
        "partial_log_sums": workspace.log_sums,
        "arrivals": workspace.arrivals,
        "pieces": batch.plan.pieces,
        "num_pieces": num_pieces,
        "partial_start": batch.plan.partial_start,
        "query_start_loc": batch.query_start_loc,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "max_blocks": batch.block_tables.shape[1],
        "scale": scale * LOG2_E,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "MAX_QUERY_LEN": shape.max_query_len,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": shape.window or 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_R": power_of_two(rows),
        "BLOCK_P": partials_at_a_time(rows, block_d, num_warps),
        "UPCAST": INTERPRETED,
        "IN_TURNS": num_programs < num_pieces,
    }
    # Keys wait for their block's id: of five stages, two tiles of keys and values are in flight while one is
    # computed.
    # With 8 warps a block has the multiprocessor to itself; by itself the assembler would spill for a second.
    max_registers = 65_536 // (32 * num_warps) - 1 if num_warps == 8 else None
    return Launch(_attend_pieces, (num_kv_heads, num_programs), arguments, num_warps, 5, max_registers)


@triton.jit(do_not_specialize=["num_pieces"])
def _attend_pieces(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    arrivals: tl.tensor,
    pieces: tl.tensor,
    num_pieces: tl.tensor,
    partial_start: tl.tensor,
    query_start_loc: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
    IN_TURNS: tl.constexpr,
):
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    seq = tl.load(pieces + index * 4)
    # The two calls are the same.
    # fmt: off
    if IN_TURNS:
        while seq >= 0:
            _attend_piece(
                kv_head, seq, pieces + index * 4, q, k_cache, v_cache, out, partial_outputs, partial_log_sums,
                arrivals, partial_start, query_start_loc, context_lens, block_tables, max_blocks, scale,
                NUM_HEADS, NUM_KV_HEADS, MAX_QUERY_LEN, HEAD_DIM, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N,
                BLOCK_D, BLOCK_R, BLOCK_P, UPCAST,
            )
            index += tl.num_programs(1)
            seq = tl.load(pieces + index * 4, mask=index < num_pieces, other=-1)
    elif seq >= 0:
        _attend_piece(
            kv_head, seq, pieces + index * 4, q, k_cache, v_cache, out, partial_outputs, partial_log_sums,
            arrivals, partial_start, query_start_loc, context_lens, block_tables, max_blocks, scale,
            NUM_HEADS, NUM_KV_HEADS, MAX_QUERY_LEN, HEAD_DIM, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_R, BLOCK_P, UPCAST,
        )
    # fmt: on


@triton.jit
def _attend_piece(
    kv_head: tl.tensor,
    seq: tl.tensor,
    piece: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    arrivals: tl.tensor,
    partial_start: tl.tensor,
    query_start_loc: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    NUM_ROWS: tl.constexpr = GROUP * MAX_QUERY_LEN
    rows = tl.arange(0, BLOCK_M)  # (query, head of the group)
    query = rows // GROUP
    dims = tl.arange(0, BLOCK_D)
    first_key = tl.load(piece + 1)
    end_key = tl.load(piece + 2)
    partial = tl.load(piece + 3)
    query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    last_key = tl.load(context_lens + seq) - query_len + query  # that a row sees
    in_rows = (query < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    row_offsets = ((query_start + query).to(tl.int64) * NUM_HEADS + kv_head * GROUP + rows % GROUP) * HEAD_DIM
    queries = tl.load(q + row_offsets[:, None] + dims[None, :], mask=in_rows, other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        queries = queries.to(tl.float32)
    table = block_tables + seq.to(tl.int64) * max_blocks
    # fmt: off
    attended, log_sums = _attend_keys(
        queries, last_key, k_cache, v_cache, table, kv_head, first_key, end_key, scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, UPCAST,
    )
    # fmt: on
    if partial < 0:
        tl.store(out + row_offsets[:, None] + dims[None, :], attended.to(out.dtype.element_ty), mask=in_rows)
    else:
        partial_rows = (partial.to(tl.int64) * NUM_KV_HEADS + kv_head) * NUM_ROWS + rows
        tl.store(partial_outputs + partial_rows[:, None] * HEAD_DIM + dims[None, :], attended, mask=in_rows)
        tl.store(partial_log_sums + partial_rows, log_sums, mask=query < query_len)
        first = tl.load(partial_start + seq)
        end = tl.load(partial_start + seq + 1)
        arrived = arrivals + seq * NUM_KV_HEADS + kv_head
        tl.debug_barrier()  # all threads have stored, before one of them reports it to other multiprocessors
        if tl.atomic_add(arrived, 1, sem="acq_rel") == end - first - 1:
            tl.store(arrived, 0)
            merged_rows = tl.arange(0, BLOCK_R)
            merged_query = merged_rows // GROUP
            in_merged = merged_query < query_len
            # fmt: off
            values = merged(
                partial_outputs, partial_log_sums, first, end, kv_head, merged_rows, in_merged,
                NUM_KV_HEADS, NUM_ROWS, HEAD_DIM, BLOCK_R, BLOCK_D, BLOCK_P,
            )
            # fmt: on
            head = kv_head * GROUP + merged_rows % GROUP
            offsets = ((query_start + merged_query).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
            mask = in_merged[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(out + offsets[:, None] + dims[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _attend_keys(
    queries: tl.tensor,
    last_key: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attends to the keys [first_key, end_key): returns rows' outputs [BLOCK_M, BLOCK_D], and log2 of the
    sums of exp2 of their scores."""
    dims = tl.arange(0, BLOCK_D)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = (keys < end_key)[:, None] & (dims < HEAD_DIM)[None, :]
        if (
            BLOCK_SIZE % BLOCK_N == 0
        ):  # rows of the cache, all heads', fit 32 bits on any GPU; elements do not
            block = tl.load(table + start // BLOCK_SIZE)
            slots = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end_key, other=0)
            slots = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
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

    sums = tl.where(total > 0.0, total, 1.0)
    return acc / sums[:, None], largest + tl.log2(sums)
