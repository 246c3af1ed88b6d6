"""Cuts a batch of prompts into tiles of queries, and, where these are fewer than the GPU has multiprocessors,
their keys into pieces. Made on the host, once a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .launch import cdiv

_MIN_PIECE_KEYS = 256  # less is not worth a partial result


@dataclass(frozen=True)
class PrefillPlan:
    """Lists the queries, and the keys of these, that each program takes."""

    tiles: torch.Tensor  # int32 [num_tiles, 2]: (sequence, its first query of the tile)
    # int32 [num_pieces, 3]: (tile, first key, key behind the last); None: nothing is split
    pieces: torch.Tensor | None = None
    # int32 [num_tiles + 1]: tile t's pieces are rows [t]:[t + 1], by their keys
    partial_start: torch.Tensor | None = None


def plan_prefill(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    num_tokens: int,
    num_keys: int,
    num_programs: int,
    window: int | None = None,
) -> PrefillPlan:
    """Returns tiles of `num_tokens` tokens, those with the most keys first, so that the last to start finish
    soon. Pieces have a multiple of `num_keys` keys, and number at most `num_programs`, which is how many of a
    kv head run at a time; none where there are that many tiles already."""
    tiles = [
        (context_len - query_len + min(first + num_tokens, query_len), seq, first)
        for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
        for first in range(0, query_len, num_tokens)
    ]
    tiles.sort(reverse=True)
    ordered = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32).view(-1, 2)
    if not 0 < len(tiles) < num_programs:
        return PrefillPlan(ordered)
    ranges = []  # of each tile's keys
    for end_key, seq, first in tiles:
        first_position = context_lens[seq] - query_lens[seq] + first
        first_key = 0 if window is None else max(first_position - window + 1, 0) // num_keys * num_keys
        ranges.append((first_key, end_key))
    counts = _num_pieces(
        [cdiv(end - first, num_keys) for first, end in ranges], num_programs, cdiv(_MIN_PIECE_KEYS, num_keys)
    )
    if max(counts) == 1:
        return PrefillPlan(ordered)
    pieces, starts = [], [0]
    for tile, ((first, end), count) in enumerate(zip(ranges, counts, strict=True)):
        blocks = cdiv(end - first, num_keys)
        # They differ by one block at most: the last is not a mere rest.
        cuts = [first + blocks * i // count * num_keys for i in range(count)]
        pieces += [(tile, *piece) for piece in zip(cuts, [*cuts[1:], end], strict=True)]
        starts.append(len(pieces))
    return PrefillPlan(
        ordered, torch.tensor(pieces, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)
    )


def _num_pieces(blocks: list[int], most: int, least_blocks: int) -> list[int]:
    """Returns the number of pieces of each tile, `most` together: as small as that allows, but no less than
    `least_blocks` where a tile has more."""
    size = max(least_blocks, cdiv(sum(blocks), most))
    while sum(counts := [cdiv(each, size) for each in blocks]) > most:
        size += 1
    return counts
