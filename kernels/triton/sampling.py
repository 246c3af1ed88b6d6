"""Samples tokens from logits without sorting and without the host: one program draws one token, so that a
draw never depends on its batch.

Top-k and top-p are each the highest cut with enough tokens, or enough mass, at or above it, found by
bisection; each step continues from the nearest existing logit, so that ten to twenty suffice. As soon as the
remaining tokens fit one tile they are copied, in their order, and the row is not read again
(`logit_search.py`).

The random number is exactly that of `kernels/random_numbers.py`, and tokens are on its line by id, as in
`engine/distribution.py`. Differences from the CPU: a GPU's `exp` is off by about 1e-7 times the distance to
the largest logit (over the temperature), relatively, and masses, float64 on both, are summed in another
order. So the border between two neighbours may shift, by some 1e-7 of the total, 1e-6 at worst: a random
number just between the two borders draws the neighbour. Where the mass of some tokens is that close to the
top-p bound, or a weight to min-p, one token more or less may be kept. Top-p distinguishes different logits
whose weights round to the same number here, but not on the CPU. Greedy rows and top-k are always equal."""

import torch
import triton
import triton.language as tl

from ..sampling import GREEDY_BELOW, SamplingBatch, check_logits
from .launch import Launch, power_of_two
from .logit_search import (
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    first_largest,
    highest_cut,
    inverse_cdf,
    logit_of,
    measure,
    place_at,
)

_MIN_BLOCK, _MAX_BLOCK = 16, 4096
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """`kernels.sampling.sample`: token ids int64 [N] from logits float32 [R, V]; those of padding are
    undefined."""
    check_logits(logits)
    out = torch.empty(batch.rows.shape, dtype=torch.int64, device=logits.device)
    if out.numel():
        sample_launch(logits, batch, out).run()
    return out


def sample_launch(logits: torch.Tensor, batch: SamplingBatch, out: torch.Tensor) -> Launch:
    vocab_size = logits.shape[1]
    block = min(max(power_of_two(vocab_size), _MIN_BLOCK), _MAX_BLOCK)
    candidates = (len(out), block)
    arguments = {
        "logits": logits,
        "rows": batch.rows,
        "temperatures": batch.temperature,
        "top_ks": batch.top_k,
        "top_ps": batch.top_p,
        "min_ps": batch.min_p,
        "seeds": batch.seed,
        "choices": batch.choice,
        "indices": batch.index,
        "out": out,
        "candidate_logits": torch.empty(candidates, device=logits.device),
        "candidate_ids": torch.empty(candidates, dtype=torch.int32, device=logits.device),
        "VOCAB_SIZE": vocab_size,
        "BLOCK": block,
    }
    # 128 registers of 256 threads: two rows a multiprocessor, and a batch of 256 in one wave.
    num_warps = max(block // 512, 1)
    return Launch(_draw_token, (len(out),), arguments, num_warps, num_stages=1, max_registers=128)


@triton.jit
def _draw_token(
    logits: tl.tensor,
    rows: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    choices: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    candidate_logits: tl.tensor,
    candidate_ids: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    row = tl.load(rows + n)
    if row < 0:
        return
    source = logits + row.to(tl.int64) * VOCAB_SIZE
    best, top_key = first_largest(source, VOCAB_SIZE, BLOCK)
    temperature = tl.load(temperatures + n)
    overflowed = (top_key >= KEY_OF_INFINITY) | (top_key <= KEY_OF_MINUS_INFINITY)
    if (temperature < _GREEDY_BELOW) | overflowed:
        tl.store(out + n, best.to(tl.int64))
        return

    largest = logit_of(top_key)
    scale = (1.0 / temperature).to(tl.float32)
    top_k = tl.load(top_ks + n)
    top_p = tl.load(top_ps + n)
    values = candidate_logits + n.to(tl.int64) * BLOCK
    ids = candidate_ids + n.to(tl.int64) * BLOCK
    size = tl.full([], VOCAB_SIZE, tl.int32)  # of the source; tokens that have left it have no weight
    cut = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)  # no token below this key is drawn
    count = tl.full([], VOCAB_SIZE, tl.int32)  # of tokens at or above it
    last_at_cut = tl.full([], VOCAB_SIZE, tl.int32)  # and none behind this place of those at it
    # fmt: off
    if (top_k > 0) & (top_k < VOCAB_SIZE):
        source, size, cut, count = highest_cut(
            source, size, values, ids, cut, top_key, count, top_k.to(tl.float64), largest, scale, False, BLOCK
        )
    if top_p < 1.0:
        _, mass, _, _ = measure(source, size, cut, largest, scale, True, BLOCK)
        target = top_p * mass
        source, size, cut, count = highest_cut(
            source, size, values, ids, cut, top_key, count, target, largest, scale, True, BLOCK
        )
        num_above, mass_above, _, _ = measure(source, size, cut + 1, largest, scale, True, BLOCK)
        needed = tl.ceil((target - mass_above) / tl.exp((logit_of(cut) - largest) * scale).to(tl.float64))
        num_at_cut = tl.maximum(tl.minimum(needed, (count - num_above).to(tl.float64)), 1.0).to(tl.int32)
        if num_at_cut < count - num_above:
            last_at_cut = place_at(source, size, cut, num_at_cut, BLOCK)
    # fmt: on
    share = uniform(
        tl.load(seeds + n).to(tl.uint64),
        tl.load(choices + n).to(tl.uint64),
        tl.load(indices + n).to(tl.uint64),
    )
    min_p = tl.load(min_ps + n).to(tl.float32)
    place = inverse_cdf(source, size, cut, last_at_cut, min_p, share, largest, scale, BLOCK)
    token = tl.where(place < 0, best, place)
    if (size < VOCAB_SIZE) & (place >= 0):
        token = tl.load(ids + place)
    tl.store(out + n, token.to(tl.int64))


@triton.jit
def uniform(seed: tl.tensor, choice: tl.tensor, index: tl.tensor):
    """`kernels.random_numbers.uniform` of uint64 numbers."""
    state = _mix(seed)
    state = _mix(state ^ choice)
    return (_mix(state ^ index) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def _mix(value: tl.tensor):
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)
