"""Random paged batches, and how far a result is from the exact one."""

from itertools import count

import torch

from pdserve.kernels import AttentionBatch


def paged_batch(
    query_lens: list[int], context_lens: list[int], block_size: int
) -> tuple[AttentionBatch, int]:
    """Sequences over shuffled blocks, on the host; returns the batch and how many blocks its cache must
    have."""
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts)
    free, places = torch.randperm(num_blocks), count()
    tables = torch.zeros((len(counts), max(counts)), dtype=torch.int32)
    for table, blocks in zip(tables, counts, strict=True):
        table[:blocks] = free[[next(places) for _ in range(blocks)]]
    slots = []
    for table, query_len, context_len in zip(tables, query_lens, context_lens, strict=True):
        positions = torch.arange(context_len - query_len, context_len)
        slots.append(table[positions // block_size].long() * block_size + positions % block_size)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return AttentionBatch(
        starts, torch.tensor(context_lens, dtype=torch.int32), tables, torch.cat(slots)
    ), num_blocks


def poison_unused(cache: torch.Tensor, batch: AttentionBatch) -> None:
    """Slots of `cache` [2, num_blocks, Hkv, block_size, D] that hold no token become NaN: nothing may come of
    reading them."""
    block_size = cache.shape[3]
    used = torch.zeros(cache.shape[1], block_size, dtype=torch.bool)
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        keys = torch.arange(length)
        used[table[keys // block_size].long(), keys % block_size] = True
    cache.masked_fill_(~used[None, :, None, :, None], torch.nan)


def spoil_memory(like: torch.Tensor) -> None:
    """Makes the next allocation of this size contain NaN, so that an element that is never written shows."""
    spoilt = [torch.full_like(like, torch.nan) for _ in range(2)]
    del spoilt


def row_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest |actual - exact| / |exact| of any row, the last axis; NaN where something is NaN.

    By rows, as one that is wrong among thousands hardly moves the norm of all.
    """
    actual, exact = actual.cpu().double().view(exact.shape), exact.cpu().double()
    difference = (actual - exact).norm(dim=-1)
    return float((difference / exact.norm(dim=-1).clamp_min(1e-9)).max())


def num_different(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The number of elements that differ."""
    return float((actual.cpu().view(expected.shape) != expected.cpu()).sum())


def worst(*errors: float) -> float:
    """The largest, and NaN where one of them is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
