"""Cuts a decode batch's keys into pieces of about equal work. The number of pieces has a bound that depends
on the batch's capacity alone, so a captured graph launches over that bound and finds the current pieces in
its metadata.

Made on the CPU, once a step (for each window that the model has), before the step is launched."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .launch import cdiv

MAX_QUERY_LEN = 8
NO_PARTIAL = -1  # the piece has all of its sequence's keys: its result is the final one
_NO_SEQUENCE = -1
_WAVES = 4
_BLOCKS_PER_MULTIPROCESSOR = 3  # that fit, by the shared memory of a decode program on Hopper
_MIN_PAGES = 2  # per piece: fewer are not worth a partial result


@dataclass(frozen=True)
class DecodeShape:
    """The parameters for which a graph is captured."""

    max_seqs: int
    max_query_len: int
    num_kv_heads: int
    block_size: int
    num_multiprocessors: int
    window: int | None = None
    # keys of a piece at most; None: by the batch's load, on which a sum's order then depends
    split_keys: int | None = None
    # a wave of programs shares the pieces; else each piece has a program, which balances better
    takes_turns: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_query_len <= MAX_QUERY_LEN:
            raise ValueError(
                f"max_query_len: {self.max_query_len} is not valid, expected 1 to {MAX_QUERY_LEN}"
            )
        if self.split_keys is not None and (self.split_keys < 1 or self.split_keys % self.tile):
            raise ValueError(
                f"split_keys: {self.split_keys} is not valid, expected a multiple of {self.tile}"
            )

    @property
    def tile(self) -> int:
        """Pieces begin at multiples of it: a page, or several where pages are small."""
        return self.block_size * cdiv(64, self.block_size)

    @property
    def wanted_pieces(self) -> int:
        """The number of pieces per kv head, where the load is large enough."""
        return cdiv(_WAVES * _BLOCKS_PER_MULTIPROCESSOR * self.num_multiprocessors, self.num_kv_heads)

    def max_pieces(self, max_context_len: int) -> int:
        """The maximum number of pieces of a plan for this shape, as long as contexts stay within
        `max_context_len`."""
        if self.split_keys is not None:
            return self.max_seqs * cdiv(max_context_len, self.split_keys)
        most = cdiv(cdiv(max_context_len, self.tile), self.min_tiles)
        return min(self.wanted_pieces + self.max_seqs, self.max_seqs * most)

    def num_programs(self, num_pieces: int) -> int:
        """The number of programs per kv head."""
        wave = cdiv(_BLOCKS_PER_MULTIPROCESSOR * self.num_multiprocessors, self.num_kv_heads)
        return min(num_pieces, wave) if self.takes_turns else num_pieces

    @property
    def min_tiles(self) -> int:
        """The minimum number of tiles of a piece, where the load decides; fewer only where a sequence has no
        more."""
        return cdiv(_MIN_PAGES * self.block_size, self.tile)


@dataclass(frozen=True)
class DecodePlan:
    """Lists the keys that each program reads, and where it writes.

    A row of `pieces` is (sequence, first key, key behind the last, row of the partial results or NO_PARTIAL);
    rows behind the plan's pieces have no sequence. The partial results of sequence s are rows
    `partial_start[s]:partial_start[s + 1]`, in the order of their keys; none where one piece has all keys.
    """

    shape: DecodeShape
    pieces: torch.Tensor  # int32 [max_pieces, 4]; fewer where the plan is not one of a captured graph
    partial_start: torch.Tensor  # int32 [max_seqs + 1]

    def trimmed(self) -> "DecodePlan":
        """Returns the pieces without rows that have no sequence; for a plan on the host."""
        return DecodePlan(self.shape, self.pieces[self.pieces[:, 0] != _NO_SEQUENCE], self.partial_start)

    def to(self, device: str) -> "DecodePlan":
        return DecodePlan(self.shape, self.pieces.to(device), self.partial_start.to(device))


def plan_decode(
    shape: DecodeShape, query_lens: list[int], context_lens: list[int], max_context_len: int
) -> DecodePlan:
    """Returns the plan of a batch of `len(query_lens)` sequences; those of no queries, and those up to
    `max_seqs`, have no pieces.

    Raises ValueError for a batch that does not fit the shape.
    """
    _check(shape, query_lens, context_lens, max_context_len)
    ends = np.where(np.array(query_lens) > 0, context_lens, 0).astype(np.int64)
    starts = np.zeros_like(ends)
    if shape.window is not None:
        starts = (
            np.maximum(ends - np.array(query_lens, dtype=np.int64) - shape.window + 1, 0)
            // shape.tile
            * shape.tile
        )
    tiles = -(-(ends - starts) // shape.tile)
    counts = -(-tiles // _tiles_of_a_piece(shape, tiles))
    partials = np.where(counts > 1, counts, 0)
    partial_start = np.zeros(shape.max_seqs + 1, dtype=np.int32)
    partial_start[1 : len(ends) + 1] = partials.cumsum()
    partial_start[len(ends) + 1 :] = partial_start[len(ends)]
    pieces = np.zeros((shape.max_pieces(max_context_len), 4), dtype=np.int32)
    pieces[:, 0] = _NO_SEQUENCE
    owners = np.repeat(np.arange(len(ends)), counts)
    ordinals = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
    # The pieces of a sequence differ by one tile at most: the last is not a mere rest.
    begin, end = (
        starts[owners] + tiles[owners] * i // counts[owners] * shape.tile for i in (ordinals, ordinals + 1)
    )
    used = pieces[: len(owners)]
    used[:, 0] = owners
    used[:, 1] = begin
    used[:, 2] = np.minimum(end, ends[owners])
    used[:, 3] = np.where(counts[owners] > 1, partial_start[owners] + ordinals, NO_PARTIAL)
    return DecodePlan(shape, torch.from_numpy(pieces), torch.from_numpy(partial_start))


def _tiles_of_a_piece(shape: DecodeShape, tiles: npt.NDArray[np.int64]) -> int:
    """Returns the maximum number of keys of a piece, such that the batch has about the wanted number of
    pieces."""
    if shape.split_keys is not None:
        return shape.split_keys // shape.tile
    return max(cdiv(int(tiles.sum()), shape.wanted_pieces), shape.min_tiles)


def _check(shape: DecodeShape, query_lens: list[int], context_lens: list[int], max_context_len: int) -> None:
    if not len(query_lens) == len(context_lens) <= shape.max_seqs:
        raise ValueError(f"batch: {len(query_lens)} sequences do not fit a graph of {shape.max_seqs}")
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        if not 0 <= query_len <= min(shape.max_query_len, context_len) or context_len > max_context_len:
            raise ValueError(
                f"batch: {query_len} queries over {context_len} keys do not fit a graph of"
                f" {shape.max_query_len} queries and {max_context_len} keys"
            )
