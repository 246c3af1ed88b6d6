"""Turns a batch of chunks into the flat tensors a model computes on. On the hot path of every step: plain
lists, one tensor per list, and block tables that are kept from step to step."""

from array import array

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import AttentionBatch
from .batch import Batch
from .model import ModelInput, SampledRows


class BlockTables:
    """The block table of each row of the batch, kept up to date by the changes since the last step.

    A sequence's block list only grows, or is replaced by another list (see KVManager): a row whose list is
    the one it mirrored before only needs the new blocks. Decode batches keep their order, so that is nearly
    every row."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._tables = np.zeros((0, max_blocks), dtype=np.int32)
        self._mirrored: list[list[int]] = []
        self._lengths: list[int] = []

    def update(self, block_lists: list[list[int]]) -> bool:
        """Sets the rows of this step; returns whether any row has changed."""
        self._reserve(len(block_lists))
        changed = False
        for row, block_ids in enumerate(block_lists):
            if self._mirrored[row] is not block_ids:
                self._mirrored[row] = block_ids
                self._lengths[row] = 0
            known, length = self._lengths[row], len(block_ids)
            if known < length:
                self._tables[row, known:length] = block_ids[known:]
                self._lengths[row] = length
                changed = True
        return changed

    def rows(self, num_rows: int) -> torch.Tensor:
        """Returns int32 [num_rows, max_blocks]; valid until the next `update`."""
        return torch.from_numpy(self._tables[:num_rows])

    def slots(self, positions: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.int64]:
        """Returns the slot of one position of each row, [num_rows]."""
        blocks = self._tables[np.arange(len(positions)), positions // block_size].astype(np.int64)
        slots: npt.NDArray[np.int64] = blocks * block_size + positions % block_size
        return slots

    def _reserve(self, num_rows: int) -> None:
        missing = num_rows - len(self._mirrored)
        if missing > 0:
            more = np.zeros((missing, self._max_blocks), dtype=np.int32)
            self._tables = np.concatenate((self._tables, more))
            self._mirrored += [[] for _ in range(missing)]
            self._lengths += [0] * missing


class InputBuilder:
    """Builds one `ModelInput` per step."""

    def __init__(self, block_size: int, max_model_len: int) -> None:
        self._block_size = block_size
        self._tables = BlockTables(-(-max_model_len // block_size))

    def build(self, batch: Batch) -> ModelInput:
        size = self._block_size
        token_ids, positions, slots = array("q"), array("q"), array("q")
        starts, context_lens, rows = array("i", (0,)), array("i"), array("q")
        all_sampled, needs_all = True, False
        for chunk in batch.chunks:
            seq, num_tokens = chunk.sequence, chunk.num_tokens
            start, end = chunk.start, chunk.end
            if num_tokens == 1:
                token_ids.append(0 if seq.num_pending_tokens else seq.token_ids[start])
                positions.append(start)
                slots.append(seq.block_ids[start // size] * size + start % size)
            else:
                token_ids.extend(seq.token_ids[start:end])
                positions.extend(range(start, end))
                slots.extend(_slots(seq.block_ids, start, end, size))
            if num_tokens > 1 or not chunk.choices:
                needs_all = needs_all or seq.wants_prompt_logprobs
            starts.append(len(token_ids))
            context_lens.append(end)
            if chunk.choices:
                rows.append(len(token_ids) - 1)
            all_sampled = all_sampled and num_tokens == 1 and bool(chunk.choices)
        self._tables.update([chunk.sequence.block_ids for chunk in batch.chunks])
        tables = self._tables.rows(len(batch.chunks))
        attention = AttentionBatch(_int32(starts), _int32(context_lens), tables, _int64(slots))
        sampled = None if all_sampled else sampled_rows(attention, _int64(rows))
        return ModelInput(_int64(token_ids), _int64(positions), attention, sampled, needs_all)


def sampled_rows(attention: AttentionBatch, rows: torch.Tensor) -> SampledRows:
    """Returns the attention batch of the given rows, int64 [R], each the last one of its sequence."""
    if not len(rows):
        return SampledRows(rows, None)
    sequences = torch.searchsorted(attention.query_start_loc, rows, right=True) - 1
    alone = AttentionBatch(
        query_start_loc=torch.arange(len(rows) + 1, dtype=torch.int32),
        context_lens=attention.context_lens[sequences],
        block_tables=attention.block_tables[sequences],
        slot_mapping=attention.slot_mapping[rows],
    )
    return SampledRows(rows, alone)


def _slots(block_ids: list[int], start: int, end: int, block_size: int) -> "array[int]":
    slots = array("q")
    for position in range(start - start % block_size, end, block_size):
        first = block_ids[position // block_size] * block_size
        slots.extend(range(first + max(start - position, 0), first + min(end - position, block_size)))
    return slots


def _int32(values: "array[int]") -> torch.Tensor:
    return torch.frombuffer(values, dtype=torch.int32)


def _int64(values: "array[int]") -> torch.Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
