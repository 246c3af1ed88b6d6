"""P's chunk plan: finished parts of the forward pass come in, chunks of the right size go out."""

from typing import NamedTuple

from .span import Coverage, Span

_TOKEN_ALIGNMENT = 16  # cuts between tokens fall on block boundaries of the usual block sizes


class ReadyPart(NamedTuple):
    """A part that may leave, and the store's mark behind which it is final."""

    span: Span
    mark: int


class ChunkPlanner:
    """Joins ready parts until a chunk is full, and cuts parts that are too large. Each cell leaves exactly
    once."""

    def __init__(self, whole: Span, bytes_per_cell: int, chunk_bytes: int) -> None:
        if bytes_per_cell > chunk_bytes:
            raise ValueError(
                f"one layer of one token has {bytes_per_cell} bytes, a chunk {chunk_bytes} at most"
            )
        self._whole = whole
        self._coverage = Coverage(whole)
        self._max_cells = chunk_bytes // bytes_per_cell
        self._ready: list[ReadyPart] = []

    @property
    def is_empty(self) -> bool:
        return not self._ready

    @property
    def num_missing(self) -> int:
        """Returns the number of cells that have not been computed."""
        return self._coverage.num_missing

    def add(self, span: Span, mark: int = 0) -> None:
        """Adds `span`, which is final. Raises ValueError when part of it was added before or is outside the
        transfer."""
        wanted = span.without_tokens_before(self._whole.token_start)
        if wanted is None:
            return
        self._coverage.add(wanted)
        self._ready.append(ReadyPart(wanted, mark))
        while self._join(len(self._ready) - 1):
            continue

    def take(self, flush: bool) -> ReadyPart | None:
        """Returns the next chunk, or None; with `flush`, also one that is not full."""
        for index, (span, mark) in enumerate(self._ready):
            if flush or self._is_full(span):
                chunk, rest = self._cut(span)
                self._ready[index : index + 1] = [ReadyPart(each, mark) for each in rest]
                self._join(index)
                return ReadyPart(chunk, mark)
        return None

    def _join(self, index: int) -> bool:
        """Merges the span at `index`, if there is one, with the previous span, if it continues it. A span
        that fills a chunk must not wait for more, which is computed later."""
        if not 0 < index < len(self._ready):
            return False
        before, this = self._ready[index - 1 : index + 1]
        if self._is_full(before.span):
            return False
        joined = before.span.joined(this.span)
        if joined is not None:
            self._ready[index - 1 : index + 1] = [ReadyPart(joined, max(before.mark, this.mark))]
        return joined is not None

    def _is_full(self, span: Span) -> bool:
        return span.num_tokens * (span.num_layers + 1) > self._max_cells

    def _cut(self, span: Span) -> tuple[Span, list[Span]]:
        rest = []
        if span.num_tokens > self._max_cells:
            token = span.token_start + self._max_cells
            aligned = token - token % _TOKEN_ALIGNMENT
            token = aligned if aligned > span.token_start else token
            rest.append(Span(span.layer_start, span.layer_end, token, span.token_end))
            span = Span(span.layer_start, span.layer_end, span.token_start, token)
        layer = span.layer_start + max(1, self._max_cells // span.num_tokens)
        if layer < span.layer_end:
            rest.insert(0, Span(layer, span.layer_end, span.token_start, span.token_end))
            span = Span(span.layer_start, layer, span.token_start, span.token_end)
        return span, rest
