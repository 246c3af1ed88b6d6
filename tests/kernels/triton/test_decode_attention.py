"""Decode attention in pieces equals the torch reference, and a plan's pieces contain each key once."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pdserve.kernels import AttentionBatch
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.decode_attention import DecodeBatch, decode_attention, decode_workspace
from pdserve.kernels.triton.decode_plan import DecodePlan, DecodeShape, plan_decode

from ..conftest import halves, paged_batch
from .support import DEVICE, assert_close_in_dtype, random_case

MAX_CONTEXT_LEN = 1024
reference = TorchKernels()

WHOLE = ([1, 1, 1], [7, 64, 330], None)  # query lengths, context lengths, window
GUESSES = ([3, 8, 1, 5], [3, 90, 180, 257], None)
WINDOWS = ([1, 4], [600, 640], 40)
CASES = [  # query heads, kv heads, head_dim, block_size, batch
    (8, 2, 64, 16, WHOLE),
    (8, 2, 64, 64, GUESSES),
    (14, 2, 64, 32, WINDOWS),
    (4, 1, 128, 64, WHOLE),
    (2, 2, 128, 128, GUESSES),
    (8, 1, 128, 16, GUESSES),
    (4, 2, 80, 16, GUESSES),
    (3, 1, 96, 24, WHOLE),
    (3, 1, 120, 24, GUESSES),
    (2, 1, 256, 64, WINDOWS),
    (4, 2, 64, 16, ([1], [1], None)),
    (4, 2, 64, 16, ([2], [600], 330)),
    (4, 2, 64, 16, ([5], [64], 1)),
]


def decode_shape(
    num_kv_heads: int,
    block_size: int,
    max_seqs: int = 6,
    window: int | None = None,
    split_keys: int | None = None,
    takes_turns: bool = False,
) -> DecodeShape:
    return DecodeShape(max_seqs, 8, num_kv_heads, block_size, 1, window, split_keys, takes_turns)


def padded(batch: AttentionBatch, plan: DecodePlan) -> DecodeBatch:
    """The batch in the tensors of a captured graph: sequences behind it are garbage."""
    missing = plan.shape.max_seqs - len(batch.context_lens)
    rubbish = torch.full((missing,), 10**6, dtype=torch.int32)
    return DecodeBatch(
        torch.cat((batch.query_start_loc, rubbish)).to(DEVICE),
        torch.cat((batch.context_lens, rubbish)).to(DEVICE),
        torch.cat((batch.block_tables, rubbish[:, None].expand(-1, batch.block_tables.shape[1]))).to(DEVICE),
        plan.to(DEVICE),
    )


@pytest.mark.parametrize(("dtype", "takes_turns"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size", "lengths"), CASES)
def test_decode_attention(
    dtype: torch.dtype,
    takes_turns: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    lengths: tuple[list[int], list[int], int | None],
) -> None:
    query_lens, context_lens, window = lengths
    batch, q, cache = random_case(
        dtype, num_heads, num_kv_heads, head_dim, block_size, (query_lens, context_lens)
    )
    shape = decode_shape(num_kv_heads, block_size, window=window, takes_turns=takes_turns)
    plan = plan_decode(shape, query_lens, context_lens, MAX_CONTEXT_LEN)
    workspace = decode_workspace(shape, num_heads, head_dim, MAX_CONTEXT_LEN, DEVICE)
    out = decode_attention(
        q.to(DEVICE), *halves(cache.to(DEVICE)), padded(batch, plan), workspace, head_dim**-0.5
    )
    exact = reference.paged_attention(q.double(), *halves(cache.double()), batch, head_dim**-0.5, window)
    assert_close_in_dtype(out, exact)
    assert not workspace.arrivals.any()  # the next layer counts from zero


@pytest.mark.parametrize("takes_turns", [False, True])
def test_the_merged_bits_do_not_depend_on_which_piece_finishes_last(takes_turns: bool) -> None:
    query_lens, context_lens = [1, 2], [450, 260]
    batch, q, cache = random_case(torch.float32, 4, 2, 64, 16, (query_lens, context_lens))
    shape = decode_shape(2, 16, split_keys=64, takes_turns=takes_turns)
    plan = plan_decode(shape, query_lens, context_lens, MAX_CONTEXT_LEN).trimmed()
    outs = []
    for order in (slice(None), torch.arange(len(plan.pieces)).flip(0), torch.randperm(len(plan.pieces))):
        shuffled = DecodePlan(shape, plan.pieces[order].contiguous(), plan.partial_start)
        workspace = decode_workspace(shape, 4, 64, MAX_CONTEXT_LEN, DEVICE)
        outs.append(
            decode_attention(
                q.to(DEVICE), *halves(cache.to(DEVICE)), padded(batch, shuffled), workspace, 0.125
            )
        )
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_with_pieces_of_fixed_size_attention_does_not_depend_on_the_batch() -> None:
    query_lens, context_lens = [1, 2, 1], [450, 130, 260]
    batch, num_blocks = paged_batch(query_lens, context_lens, 16)
    q = torch.randn(4, 4, 64).bfloat16().to(DEVICE)
    cache = torch.randn(2, num_blocks, 2, 16, 64).bfloat16().to(DEVICE)

    def attend(first: int, end: int) -> torch.Tensor:
        starts = batch.query_start_loc[first : end + 1]
        part = AttentionBatch(
            starts - starts[0],
            batch.context_lens[first:end],
            batch.block_tables[first:end],
            batch.slot_mapping,
        )
        shape = decode_shape(2, 16, split_keys=128)
        plan = plan_decode(shape, query_lens[first:end], context_lens[first:end], MAX_CONTEXT_LEN)
        workspace = decode_workspace(shape, 4, 64, MAX_CONTEXT_LEN, DEVICE)
        return decode_attention(
            q[starts[0] : starts[-1]], cache[0], cache[1], padded(part, plan), workspace, 0.125
        )

    assert torch.equal(attend(0, 3), torch.cat([attend(s, s + 1) for s in range(3)]))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_plan_covers_each_visible_key_once_and_fits_its_graph(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([16, 24, 64, 128]))
    window = data.draw(st.sampled_from([None, 1, 100, 1000]))
    max_len = data.draw(st.sampled_from([100, 5000, 100_000]))
    tile = decode_shape(2, block_size).tile
    split_keys = data.draw(st.sampled_from([None, tile, 5 * tile]))
    shape = DecodeShape(9, 8, 2, block_size, data.draw(st.sampled_from([1, 132])), window, split_keys)
    context_lens = data.draw(st.lists(st.integers(1, max_len), max_size=9))
    query_lens = [data.draw(st.integers(1, min(8, length))) for length in context_lens]
    plan = plan_decode(shape, query_lens, context_lens, max_len)
    assert len(plan.pieces) == shape.max_pieces(max_len)
    starts = plan.partial_start.tolist()
    for seq, (query_len, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        pieces = [piece[1:] for piece in plan.pieces.tolist() if piece[0] == seq]
        first_seen = 0 if window is None else max(0, length - query_len - window + 1)
        assert pieces[0][0] <= first_seen < pieces[0][1]
        assert [end for _, end, _ in pieces] == [*(begin for begin, _, _ in pieces[1:]), length]
        assert all(begin < end and begin % tile == 0 for begin, end, _ in pieces)
        rows = list(range(starts[seq], starts[seq + 1]))
        assert [row for _, _, row in pieces] == (rows or [-1])


def test_a_graph_of_short_contexts_has_room_only_for_their_pieces() -> None:
    shape = DecodeShape(4, 1, 8, 64, 132)
    assert shape.max_pieces(2048) == 4 * 16  # two pages each
    assert shape.max_pieces(131_072) == shape.wanted_pieces + 4


def test_programs_that_take_turns_are_one_wave() -> None:
    shape = DecodeShape(1, 1, 8, 64, 132, takes_turns=True)
    assert 8 * shape.num_programs(shape.max_pieces(131_072)) <= 3 * 132 + 8
    assert shape.num_programs(5) == 5


def test_a_plan_shares_a_long_context_among_all_multiprocessors() -> None:
    shape = DecodeShape(1, 1, 8, 64, 132)
    pieces = plan_decode(shape, [1], [131_072], 131_072).pieces
    sizes = [end - begin for seq, begin, end, _ in pieces.tolist() if seq >= 0]
    assert 8 * len(sizes) >= 3 * 132
    assert max(sizes) - min(sizes) <= 64


@pytest.mark.parametrize(
    ("query_lens", "context_lens"), [([1] * 7, [9] * 7), ([-1], [9]), ([9], [9]), ([2], [1]), ([1], [1025])]
)
def test_a_batch_that_does_not_fit_its_graph_is_refused(
    query_lens: list[int], context_lens: list[int]
) -> None:
    with pytest.raises(ValueError, match="batch:"):
        plan_decode(decode_shape(2, 16), query_lens, context_lens, MAX_CONTEXT_LEN)
