"""Input tensors of a step: rows, positions, slots, and block tables that follow their sequences."""

import random

import torch

from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.inputs import BlockTables, InputBuilder
from pdserve.engine.sequence import Sequence


def make_sequence(tokens: list[int], num_computed: int, block_ids: list[int]) -> Sequence:
    spec = SequenceSpec(
        transfer=TransferId("r", 0), prompt_token_ids=tuple(tokens), sampling=SamplingParams()
    )
    seq = Sequence(spec, 0, 1000)
    seq.num_computed_tokens, seq.block_ids = num_computed, block_ids
    return seq


def test_a_mixed_batch_is_laid_out_row_by_row() -> None:
    decode = make_sequence([10, 11, 12, 13, 14, 15], 5, [7, 3])
    cut = make_sequence(list(range(20, 32)), 3, [1, 9, 5])
    last = make_sequence(list(range(40, 46)), 2, [8, 2])
    batch = Batch(
        (ScheduledChunk(decode, 1, (0,)), ScheduledChunk(cut, 6, ()), ScheduledChunk(last, 4, (0, 1)))
    )
    inputs = InputBuilder(block_size=4, max_model_len=64).build(batch)
    assert inputs.token_ids.tolist() == [15, 23, 24, 25, 26, 27, 28, 42, 43, 44, 45]
    assert inputs.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5]
    attention = inputs.attention
    assert attention.slot_mapping.tolist() == [13, 7, 36, 37, 38, 39, 20, 34, 35, 8, 9]
    assert attention.query_start_loc.tolist() == [0, 1, 7, 11]
    assert attention.context_lens.tolist() == [6, 9, 6]
    assert attention.block_tables[1, :3].tolist() == [1, 9, 5]
    assert inputs.sampled is not None and inputs.sampled.attention is not None
    assert inputs.sampled.rows.tolist() == [0, 10]
    assert inputs.sampled.attention.query_start_loc.tolist() == [0, 1, 2]
    assert inputs.sampled.attention.context_lens.tolist() == [6, 6]
    assert inputs.sampled.attention.block_tables[:, :2].tolist() == [[7, 3], [8, 2]]


def test_a_decode_batch_samples_every_row_without_selecting() -> None:
    seqs = [make_sequence([1, 2, 3], 2, [4]), make_sequence([1, 2], 1, [5])]
    inputs = InputBuilder(4, 64).build(Batch(tuple(ScheduledChunk(seq, 1, (0,)) for seq in seqs)))
    assert inputs.sampled is None
    assert (
        inputs.attention.block_tables.dtype == torch.int32
        and inputs.attention.slot_mapping.dtype == torch.int64
    )


def test_block_tables_follow_lists_that_grow_change_rows_or_are_replaced() -> None:
    numbers = random.Random(0)
    tables = BlockTables(max_blocks=8)
    lists: list[list[int]] = [[] for _ in range(5)]
    for _ in range(300):
        index = numbers.randrange(5)
        action = numbers.choice(["grow", "replace", "reset", "swap"])
        if action == "grow" and len(lists[index]) < 8:
            lists[index].append(numbers.randrange(100))
        elif action == "replace" and lists[index]:
            lists[index] = [*lists[index][:-1], numbers.randrange(100)]
        elif action == "reset":
            lists[index] = []
        else:
            numbers.shuffle(lists)
        chosen = lists[: numbers.randint(1, 5)]
        before = tables.rows(len(chosen)).clone()
        changed = tables.update(chosen)
        rows = tables.rows(len(chosen))
        assert changed or torch.equal(rows[: len(before)], before)
        assert [rows[row, : len(blocks)].tolist() for row, blocks in enumerate(chosen)] == chosen
