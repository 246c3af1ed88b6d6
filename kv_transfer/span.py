"""Rectangles of (layer, token) cells: the unit in which KV becomes ready, travels and is accounted for."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Layers [layer_start, layer_end) of tokens [token_start, token_end)."""

    layer_start: int
    layer_end: int
    token_start: int
    token_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def num_cells(self) -> int:
        return (self.layer_end - self.layer_start) * (self.token_end - self.token_start)

    def joined(self, other: "Span") -> "Span | None":
        """Returns both as one rectangle when `other` continues this one in layers or in tokens."""
        same_tokens = (self.token_start, self.token_end) == (other.token_start, other.token_end)
        if same_tokens and self.layer_end == other.layer_start:
            return Span(self.layer_start, other.layer_end, self.token_start, self.token_end)
        same_layers = (self.layer_start, self.layer_end) == (other.layer_start, other.layer_end)
        if same_layers and self.token_end == other.token_start:
            return Span(self.layer_start, self.layer_end, self.token_start, other.token_end)
        return None

    def without_tokens_before(self, token: int) -> "Span | None":
        """Returns the part from `token` on; None when nothing of it is left."""
        if token <= self.token_start:
            return self
        if token >= self.token_end:
            return None
        return Span(self.layer_start, self.layer_end, token, self.token_end)


class BlockRange(NamedTuple):
    """Tokens [token_start, token_end), counted from the first one in `block_ids`."""

    block_ids: Sequence[int]
    token_start: int
    token_end: int


def block_range(span: Span, block_ids: Sequence[int], block_size: int) -> BlockRange:
    """Returns the location of a transfer's `span`, without the blocks before and behind it: a store visits
    every block it is given."""
    first = span.token_start // block_size
    touched = block_ids[first : -(-span.token_end // block_size)]
    return BlockRange(touched, span.token_start - first * block_size, span.token_end - first * block_size)


class Coverage:
    """The cells of `whole` that have arrived: each at most once, none outside."""

    def __init__(self, whole: Span) -> None:
        self._whole = whole
        self._edges: list[list[int]] = [
            [] for _ in range(whole.num_layers)
        ]  # per layer: start, end, start, end, ...
        self.num_missing = whole.num_cells

    def add(self, span: Span) -> None:
        """Accounts for `span`. Raises ValueError, changing nothing, when part of it is outside or has arrived
        before."""
        whole = self._whole
        inside = (
            whole.layer_start <= span.layer_start < span.layer_end <= whole.layer_end
            and whole.token_start <= span.token_start < span.token_end <= whole.token_end
        )
        if not inside:
            raise ValueError(f"{span} is empty or outside of {whole}")
        layers = self._edges[span.layer_start - whole.layer_start : span.layer_end - whole.layer_start]
        start, end = span.token_start, span.token_end
        for edges in layers:
            if edges and edges[-1] > start and _overlaps(edges, start, end):
                raise ValueError(f"part of {span} has arrived before")
        for edges in layers:
            if edges and edges[-1] == start:  # the common case: tokens come in order
                edges[-1] = end
            else:
                _insert(edges, start, end)
        self.num_missing -= span.num_cells


def _overlaps(edges: list[int], start: int, end: int) -> bool:
    index = bisect_left(edges, start + 1)
    return index % 2 == 1 or (index < len(edges) and edges[index] < end)


def _insert(edges: list[int], start: int, end: int) -> None:
    """Adds the interval, which overlaps none, joining it with its neighbours."""
    index = bisect_left(edges, start + 1)
    low, high = index, index
    joined = [start, end]
    if index and edges[index - 1] == start:
        low -= 1
        joined = joined[1:]
    if index < len(edges) and edges[index] == end:
        high += 1
        joined = joined[:-1]
    edges[low:high] = joined
