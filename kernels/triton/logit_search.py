"""Searches of one row of logits by one program, a tile at a time: used by `sampling.py` to draw tokens.

A source is a row, or candidates copied from it, in order of their ids; a place is an index into the source.
Logits are looked at as integers of the same order (keys), whose thresholds are exact. A weight is exp((logit
- largest) * scale)."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below every token's key
HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN
KEY_OF_INFINITY = tl.constexpr(0x7F800000)
KEY_OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)
NUM_LINES = tl.constexpr(
    4
)  # of a tile that is only added up: a thread adds up its own tokens of all lines first


@triton.jit
def _keys(logits: tl.tensor):
    """int32 in the order of the logits: both zeros are one, every NaN is the highest."""
    bits = logits.to(tl.int32, bitcast=True)
    keys = tl.where(logits == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(logits == logits, keys, HIGHEST)


@triton.jit
def logit_of(key: tl.tensor):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_tile(source: tl.tensor, start: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    """Returns (places, logits, keys) [BLOCK]; behind the end, values that no cut lets through."""
    places = start + tl.arange(0, BLOCK)
    logits = tl.load(source + places, mask=places < size, other=-float("inf"))
    return places, logits, tl.where(places < size, _keys(logits), LOWEST)


@triton.jit
def _load_lines(source: tl.tensor, start: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    """Like `_load_tile`, [NUM_LINES, BLOCK / NUM_LINES]: reductions over the lines need a quarter of the
    registers."""
    LENGTH: tl.constexpr = BLOCK // NUM_LINES
    places = start + tl.arange(0, NUM_LINES)[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    logits = tl.load(source + places, mask=places < size, other=-float("inf"))
    return places, logits, tl.where(places < size, _keys(logits), LOWEST)


@triton.jit
def first_largest(source: tl.tensor, size: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the place of the first of the largest logits, and its key."""
    best_keys = tl.full([BLOCK // NUM_LINES], LOWEST, tl.int32)
    best_places = tl.zeros([BLOCK // NUM_LINES], tl.int32)
    for start in range(0, size, BLOCK):
        places, _, keys = _load_lines(source, start, size, BLOCK)
        line_keys = tl.max(keys, 0)
        line_places = tl.min(tl.where(keys == line_keys[None, :], places, size), 0)
        best_places = tl.where(line_keys > best_keys, line_places, best_places)
        best_keys = tl.maximum(line_keys, best_keys)
    top_key = tl.max(best_keys, 0)
    return tl.min(tl.where(best_keys == top_key, best_places, size), 0), top_key


@triton.jit
def measure(
    source: tl.tensor,
    size: tl.tensor,
    cut: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns (number, mass or number, lowest key) of the tokens at or above a cut; and the highest key below
    it."""
    number = tl.zeros([BLOCK // NUM_LINES], tl.int32)
    mass = tl.zeros([BLOCK // NUM_LINES], tl.float64)
    lowest_above = tl.full([BLOCK // NUM_LINES], HIGHEST, tl.int32)
    highest_below = tl.full([BLOCK // NUM_LINES], LOWEST, tl.int32)
    for start in range(0, size, BLOCK):
        _, logits, keys = _load_lines(source, start, size, BLOCK)
        above = keys >= cut
        number += tl.sum(above.to(tl.int32), 0)
        if BY_MASS:
            mass += tl.sum(tl.where(above, tl.exp((logits - largest) * scale), 0.0).to(tl.float64), 0)
        lowest_above = tl.minimum(lowest_above, tl.min(tl.where(above, keys, HIGHEST), 0))
        highest_below = tl.maximum(highest_below, tl.max(tl.where(above, LOWEST, keys), 0))
    total = tl.sum(number, 0)
    amount = tl.sum(mass, 0) if BY_MASS else total.to(tl.float64)
    return total, amount, tl.min(lowest_above, 0), tl.max(highest_below, 0)


@triton.jit
def highest_cut(
    source: tl.tensor,
    size: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    count: tl.tensor,
    target: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the highest key in [low, high] with a number or mass of `target` at or above it; `low` has it,
    from `count` tokens.

    Returns (source, size, that key, the number of tokens at or above it): the original source, or the
    candidates in `values`."""
    while low < high:
        # Half-way between the two logits and not between the keys, most of which belong to numbers near zero.
        halfway = _keys(0.5 * logit_of(low) + 0.5 * logit_of(high))
        middle = tl.minimum(tl.maximum(halfway, low + 1), high)
        number, amount, lowest_above, highest_below = measure(
            source, size, middle, largest, scale, BY_MASS, BLOCK
        )
        enough = amount >= target
        low = tl.where(enough, lowest_above, low)
        count = tl.where(enough, number, count)
        one = tl.exp((logit_of(low) - largest) * scale).to(tl.float64) if BY_MASS else 1.0
        found = enough & (amount - one < target)  # not enough without one token of the lowest
        high = tl.where(found, low, tl.where(enough, high, highest_below))
        if (size > BLOCK) & (count <= BLOCK):
            _copy_candidates(source, size, low, values, ids, BLOCK)
            source, size = values, count
    return source, size, low, count


@triton.jit
def _copy_candidates(
    source: tl.tensor, size: tl.tensor, cut: tl.tensor, values: tl.tensor, ids: tl.tensor, BLOCK: tl.constexpr
):
    """Copies tokens at or above a cut, at most a tile of them, in order of their ids."""
    filled = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK // 2):
        places, logits, keys = _load_tile(source, start, size, BLOCK // 2)
        kept = keys >= cut
        to = filled + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, logits, mask=kept)
        tl.store(ids + to, places, mask=kept)
        filled += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of this program read what these have written


@triton.jit
def place_at(source: tl.tensor, size: tl.tensor, cut: tl.tensor, rank: tl.tensor, BLOCK: tl.constexpr):
    """Returns the place of the `rank`-th token (from 1) with exactly that key."""
    found = size
    before = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK // 2):
        places, _, keys = _load_tile(source, start, size, BLOCK // 2)
        at_cut = (keys == cut).to(tl.int32)
        is_it = (at_cut > 0) & (before + tl.cumsum(at_cut, 0) == rank)
        found = tl.minimum(found, tl.min(tl.where(is_it, places, size), 0))
        before += tl.sum(at_cut, 0)
    return found


@triton.jit
def _kept_weights(
    places: tl.tensor,
    logits: tl.tensor,
    keys: tl.tensor,
    cut: tl.tensor,
    last_at_cut: tl.tensor,
    min_p: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
):
    """Returns weights in float64, for a tile of any shape; 0 for tokens that are not kept."""
    weights = tl.exp((logits - largest) * scale)
    kept = ((keys > cut) | ((keys == cut) & (places <= last_at_cut))) & (weights >= min_p)
    return tl.where(kept, weights, 0.0).to(tl.float64)


@triton.jit
def inverse_cdf(
    source: tl.tensor,
    size: tl.tensor,
    cut: tl.tensor,
    last_at_cut: tl.tensor,
    min_p: tl.tensor,
    share: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
):
    """Returns the first place whose cumulative weight exceeds that share of the total; negative where
    rounding leaves none.

    The search goes by tiles, then by lines of the tile, then within the line.
    """
    LENGTH: tl.constexpr = BLOCK // NUM_LINES
    masses = tl.zeros([LENGTH], tl.float64)
    last_places = tl.full([LENGTH], -1, tl.int32)
    for start in range(0, size, BLOCK):
        places, logits, keys = _load_lines(source, start, size, BLOCK)
        weights = _kept_weights(places, logits, keys, cut, last_at_cut, min_p, largest, scale)
        masses += tl.sum(weights, 0)
        last_places = tl.maximum(last_places, tl.max(tl.where(weights > 0.0, places, -1), 0))
    target = share * tl.sum(masses, 0)
    last = tl.max(last_places, 0)  # where a sum in another order had been a little larger
    begin = tl.full([], 0, tl.int32)
    before = tl.full([], 0.0, tl.float64)
    inside = _tile_mass(source, begin, size, cut, last_at_cut, min_p, largest, scale, BLOCK)
    while (before + inside <= target) & (begin + BLOCK < size):
        before += inside
        begin += BLOCK
        inside = _tile_mass(source, begin, size, cut, last_at_cut, min_p, largest, scale, BLOCK)
    end = tl.minimum(begin + BLOCK, size)
    first = end
    while (begin < end) & (first == end):
        places, logits, keys = _load_tile(source, begin, size, LENGTH)
        weights = _kept_weights(places, logits, keys, cut, last_at_cut, min_p, largest, scale)
        exceeds = (weights > 0.0) & (before + tl.cumsum(weights, 0) > target)
        first = tl.min(tl.where(exceeds, places, end), 0)
        before += tl.sum(weights, 0)
        begin += LENGTH
    return tl.where(first < end, first, last)


@triton.jit
def _tile_mass(
    source: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    cut: tl.tensor,
    last_at_cut: tl.tensor,
    min_p: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
):
    places, logits, keys = _load_lines(source, start, size, BLOCK)
    weights = _kept_weights(places, logits, keys, cut, last_at_cut, min_p, largest, scale)
    return tl.sum(tl.sum(weights, 0), 0)
