"""Spans, coverage and the chunk plan: every cell exactly once, in chunks of the right size."""

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from pdserve.kv_transfer.planner import ChunkPlanner
from pdserve.kv_transfer.span import Coverage, Span, block_range


def cells(span: Span) -> set[tuple[int, int]]:
    return {
        (i, t)
        for i in range(span.layer_start, span.layer_end)
        for t in range(span.token_start, span.token_end)
    }


@st.composite
def spans(draw: st.DrawFn) -> Span:
    layer = draw(st.integers(0, 4))
    token = draw(st.integers(0, 20))
    return Span(layer, draw(st.integers(layer, 5)), token, draw(st.integers(token, 22)))


@given(st.lists(spans(), max_size=30))
def test_coverage_takes_each_cell_once_and_none_from_outside(added: list[Span]) -> None:
    whole = Span(0, 4, 2, 20)
    coverage, seen = Coverage(whole), set[tuple[int, int]]()
    for span in added:
        new = cells(span)
        if new and new <= cells(whole) and not new & seen:
            coverage.add(span)
            seen |= new
        else:
            with pytest.raises(ValueError):
                coverage.add(span)
    assert coverage.num_missing == len(cells(whole)) - len(seen)


@given(st.data(), st.integers(1, 5), st.integers(1, 60), st.integers(1, 40), st.integers(0, 30))
def test_the_plan_sends_every_computed_cell_once_in_chunks_that_fit(
    data: st.DataObject, num_layers: int, num_tokens: int, max_cells: int, num_cached: int
) -> None:
    num_cached = min(num_cached, num_tokens)
    planner = ChunkPlanner(Span(0, num_layers, num_cached, num_tokens), 100, max_cells * 100 + 50)
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens), max_size=4)) | {0, num_tokens})
    sent: list[tuple[int, int]] = []
    marks: dict[tuple[int, int], int] = {}

    def drain(flush: bool) -> None:
        while (ready := planner.take(flush)) is not None:
            assert 0 < ready.span.num_cells <= max_cells
            wanted = [marks[cell] for cell in cells(ready.span)]
            assert ready.mark >= max(wanted), "it leaves before it is computed"
            sent.extend(cells(ready.span))

    for start, end in pairwise(cuts):
        for layer in range(num_layers):
            span, mark = Span(layer, layer + 1, start, end), len(marks)
            marks.update(dict.fromkeys(cells(span), mark))
            planner.add(span, mark)
            if data.draw(st.booleans()):
                drain(flush=False)
    assert planner.num_missing == 0
    drain(flush=True)
    assert planner.is_empty
    assert sorted(sent) == sorted(cells(Span(0, num_layers, num_cached, num_tokens)))


def test_small_layers_leave_together_once_they_fill_a_chunk() -> None:
    planner = ChunkPlanner(Span(0, 8, 0, 4), bytes_per_cell=1, chunk_bytes=12)
    taken = []
    for layer in range(8):
        planner.add(Span(layer, layer + 1, 0, 4), mark=layer)
        taken.append(planner.take(flush=False))
    full = [None, None, (Span(0, 3, 0, 4), 2), None, None, (Span(3, 6, 0, 4), 5), None, None]
    assert taken == full
    assert planner.take(flush=True) == (Span(6, 8, 0, 4), 7)


def test_the_last_layer_does_not_delay_those_that_wait_for_slots() -> None:
    planner = ChunkPlanner(Span(0, 4, 0, 10), bytes_per_cell=1, chunk_bytes=10)
    for layer in range(4):
        planner.add(Span(layer, layer + 1, 0, 10), mark=layer)
    assert [planner.take(flush=False) for _ in range(4)] == [
        (Span(layer, layer + 1, 0, 10), layer) for layer in range(4)
    ]


def test_tails_of_token_chunks_grow_together_across_layers() -> None:
    planner = ChunkPlanner(Span(0, 4, 0, 40), bytes_per_cell=1, chunk_bytes=32)
    chunks = []
    for layer in range(4):
        planner.add(Span(layer, layer + 1, 0, 40))
        while (ready := planner.take(flush=False)) is not None:
            chunks.append(ready.span)
    assert any(chunk.num_layers > 1 for chunk in chunks)
    assert sum(chunk.num_cells for chunk in chunks) == 160


def test_a_cell_computed_twice_is_an_error() -> None:
    planner = ChunkPlanner(Span(0, 2, 0, 8), 1, 4)
    planner.add(Span(0, 1, 0, 8))
    with pytest.raises(ValueError, match="has arrived before"):
        planner.add(Span(0, 2, 4, 8))


def test_a_token_larger_than_a_chunk_is_an_error() -> None:
    with pytest.raises(ValueError, match="one layer of one token has 5 bytes"):
        ChunkPlanner(Span(0, 1, 0, 1), 5, 4)


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 40))
def test_a_span_lies_in_its_own_blocks_alone(block_size: int, start: int, num_tokens: int) -> None:
    block_ids = list(range(100, 200))
    end = start + num_tokens
    blocks = block_range(Span(0, 1, start, end), block_ids, block_size)
    cells = [(block_ids[token // block_size], token % block_size) for token in range(start, end)]
    tokens = range(blocks.token_start, blocks.token_end)
    assert [(blocks.block_ids[token // block_size], token % block_size) for token in tokens] == cells
    assert set(blocks.block_ids) == {block for block, _ in cells}
