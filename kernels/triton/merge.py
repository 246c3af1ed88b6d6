"""Merges partial results of attention over pieces of a sequence's keys (FlashDecoding, Dao et al. 2023).

A partial result of a row is its normalised output and log2 of the sum of exp2 of its scores. Partial results
are stored in float32 [num_partials, Hkv, rows, D] and [num_partials, Hkv, rows], and are merged in their
order, regardless of which finished last."""

import triton
import triton.language as tl

from .launch import power_of_two

_THREAD_ELEMENTS = 32
_MAX_PARTIALS = 8


def partials_at_a_time(num_rows: int, block_d: int, num_warps: int) -> int:
    """Returns how many partial results `merged` takes at once for `num_rows` rows."""
    return max(1, min(_MAX_PARTIALS, _THREAD_ELEMENTS * 32 * num_warps // (power_of_two(num_rows) * block_d)))


@triton.jit
def merged(
    partial_outputs: tl.tensor,
    partial_log_sums: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    kv_head: tl.tensor,
    rows: tl.tensor,
    in_rows: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Returns float32 [BLOCK_R, BLOCK_D]: `rows` of the partial results [first, end) as one; zeros for a row
    that has seen no key.

    Read past the L1, as another multiprocessor may have written them while this program ran.
    """
    dims = tl.arange(0, BLOCK_D)
    in_columns = in_rows[:, None] & (dims < HEAD_DIM)[None, :]  # [BLOCK_R, BLOCK_D]
    largest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # Of a tile of partial results, from its first on; 32 bits are enough for these.
    places = (tl.arange(0, BLOCK_P) * (NUM_KV_HEADS * NUM_ROWS))[:, None] + rows[
        None, :
    ]  # [BLOCK_P, BLOCK_R]
    offsets = places[:, :, None] * HEAD_DIM + dims[None, None, :]  # [BLOCK_P, BLOCK_R, BLOCK_D]
    row = (first.to(tl.int64) * NUM_KV_HEADS + kv_head) * NUM_ROWS
    for start in range(first, end, BLOCK_P):
        there = start + tl.arange(0, BLOCK_P) < end
        mask = there[:, None] & in_rows[None, :]
        log_sums = tl.load(
            partial_log_sums + row + places, mask=mask, other=-float("inf"), cache_modifier=".cg"
        )
        mask = there[:, None, None] & in_columns[None, :, :]
        values = tl.load(
            partial_outputs + row * HEAD_DIM + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
        new_largest = tl.maximum(largest, tl.max(log_sums, 0))
        # A row that has seen no key yet has -inf: it must not meet itself in a difference.
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(log_sums - base[None, :])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        largest = new_largest
        row += BLOCK_P * NUM_KV_HEADS * NUM_ROWS
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
