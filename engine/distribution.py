"""Filters and draws on one row of logits. A row's result depends on that row alone, bit for bit: never on its
batch.

numpy on one row is faster than batched tensors here: candidates are found by a threshold, so that hardly
anything is sorted."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..core.request import SamplingParams

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

_FLOORS = (
    2.0**-13,
    2.0**-16,
)  # shares of the mass; few tokens have as much, and in trained models they hold nearly all of it
_BLOCK = 512  # tokens whose weights are summed before the draw looks inside


def draw(logits: Floats, sampling: SamplingParams, uniforms: Iterable[float]) -> list[int]:
    """Returns a token id for each uniform number, from the distribution after temperature, top-k, top-p and
    min-p, in this order.

    Tokens are ordered by id on the line that a uniform number falls on, so that rounding noise in the logits
    moves tokens' borders a little but never swaps their places."""
    largest = logits.max()
    if not np.isfinite(largest):  # the model overflowed; that must not stop the other rows
        return [int(logits.argmax()) for _ in uniforms]
    candidates = _top_k(logits, sampling.top_k)
    weights = _weights(
        logits if candidates is None else logits[candidates], largest, 1.0 / sampling.temperature
    )
    if sampling.top_p < 1.0:
        nucleus = _top_p(weights, sampling.top_p)
        candidates, weights = _narrow(candidates, nucleus), weights[nucleus]
    if sampling.min_p > 0.0:
        likely = np.flatnonzero(weights >= sampling.min_p)
        candidates, weights = _narrow(candidates, likely), weights[likely]
    drawn = _inverse_cdf(weights, uniforms)
    return drawn if candidates is None else [int(candidates[index]) for index in drawn]


def best_tokens(logits: Floats, count: int) -> Indices:
    """Returns the ids of the `count` largest logits, best first; of equal ones the lower id."""
    ids = _top_k(logits, count)
    if ids is None:
        ids = np.arange(len(logits))
    order: Indices = np.argsort(-logits[ids], kind="stable")[:count]
    return ids[order]


def log_sum_exp(logits: Floats) -> float:
    """Returns NaN when the model overflowed."""
    largest = logits.max()
    if not np.isfinite(largest):
        return float("nan")
    return float(largest) + float(np.log(_weights(logits, largest, 1.0).sum(dtype=np.float64)))


def _weights(logits: Floats, largest: np.float32, scale: float) -> Floats:
    """Returns exp((logits - largest) * scale): the largest is 1. One allocation, as a row's pages cost more
    than its arithmetic."""
    weights: Floats = np.subtract(logits, largest)
    weights *= np.float32(scale)
    return np.exp(weights, out=weights)


def _narrow(candidates: Indices | None, kept: Indices) -> Indices:
    return kept if candidates is None else candidates[kept]


def _top_k(logits: Floats, k: int) -> Indices | None:
    """Returns ascending ids of all logits not below the k-th largest; None for all of them."""
    if not 0 < k < len(logits):
        return None
    edge = len(logits) - k
    return np.flatnonzero(logits >= np.partition(logits, edge)[edge])


def _top_p(weights: Floats, top_p: float) -> Indices:
    """Returns ascending indices of the fewest weights that hold `top_p` of the mass; of equal ones at the
    border the first."""
    total = float(weights.sum(dtype=np.float64))
    target = top_p * total
    # The weights below the last floor hold less than 1 - top_p of the mass, whatever they are.
    for floor in (*_FLOORS, min(_FLOORS[-1], (1.0 - top_p) / len(weights))):
        indices = np.flatnonzero(weights >= floor * total)
        top = weights[indices]
        if float(top.sum(dtype=np.float64)) >= target:
            break
    ordered = np.sort(top)[::-1]
    count = int(np.searchsorted(np.cumsum(ordered.astype(np.float64)), target)) + 1
    border = ordered[min(count, len(ordered)) - 1]
    kept = top > border
    kept[np.flatnonzero(top == border)[: count - int(np.count_nonzero(kept))]] = True
    nucleus: Indices = indices[kept]
    return nucleus


def _inverse_cdf(weights: Floats, uniforms: Iterable[float]) -> list[int]:
    """Returns for each uniform number the first index whose cumulative weight exceeds that share of the
    total."""
    starts = np.arange(0, len(weights), _BLOCK)
    cumulative = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    drawn = []
    for uniform in uniforms:
        target = uniform * cumulative[-1]
        block = int(np.searchsorted(cumulative, target, side="right"))
        before = cumulative[block - 1] if block > 0 else 0.0
        inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
        index = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - before, side="right"))
        # Rounding may point just behind the block's last weight; never at a token of weight 0.
        drawn.append(block * _BLOCK + min(index, int(np.flatnonzero(inside)[-1])))
    return drawn
