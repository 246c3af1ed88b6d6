"""The modelled engine with a queue: a step is computed when it is collected, from the values known at its
launch and from the tokens that were drawn before it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.engine.batch import Batch, Launched, SampledToken
from pdserve.engine.sequence import Sequence

from .chain_model import ChainEngine, chain, next_token


@dataclass
class _Row:
    sequence: Sequence
    start: int
    token_ids: list[int | None]  # None: pending
    block_ids: list[int]
    choices: tuple[int, ...]
    index: int
    draws: bool


@dataclass
class _Step:
    engine: "AheadEngine"
    rows: list[_Row]
    sampled: list[list[SampledToken]] | None = None

    def collect(self) -> list[list[SampledToken]]:
        while self.sampled is None:
            self.engine.run_oldest()
        return self.sampled


@dataclass
class AheadEngine(ChainEngine):
    """`launch` returns before anything is written."""

    runs_ahead: bool = True
    queue: deque[_Step] = field(default_factory=deque)
    drawn: dict[Sequence, int] = field(default_factory=dict)
    num_rows: list[int] = field(default_factory=list)  # of each step

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched:
        self.num_rows.append(len(batch.chunks))
        if on_layer is not None or batch.copies:  # these must happen at once
            while self.queue:
                self.run_oldest()
            if on_layer is not None:
                return super().launch(batch, on_layer, before_sampling)
            self.copy(batch.copies)
        if before_sampling is not None:
            before_sampling()
        rows = []
        for chunk in batch.chunks:
            seq = chunk.sequence
            known: list[int | None] = list(seq.token_ids[chunk.start : chunk.end])
            inputs = known + [None] * (chunk.num_tokens - len(known))
            index, draws = seq.num_output_tokens, seq.may_sample
            rows.append(_Row(seq, chunk.start, inputs, list(seq.block_ids), chunk.choices, index, draws))
        self.queue.append(_Step(self, rows))
        return self.queue[-1]

    def run_oldest(self) -> None:
        step = self.queue.popleft()
        step.sampled = [self._run(row) for row in step.rows]

    def _run(self, row: _Row) -> list[SampledToken]:
        first, end = row.start // self.block_size, -(-(row.start + len(row.token_ids)) // self.block_size)
        assert row.sequence.block_ids[first:end] == row.block_ids[first:end], (
            f"{row.sequence} has given its blocks away"
        )
        state = self.read(row.block_ids, row.start - 1) if row.start else 0
        for position, token_id in enumerate(row.token_ids, row.start):
            state = chain(state, self.drawn[row.sequence] if token_id is None else token_id)
            self.write(row.block_ids, position, state)
        tokens = [SampledToken(next_token(state, choice, row.index)) for choice in row.choices if row.draws]
        if len(tokens) == 1:
            self.drawn[row.sequence] = tokens[0].token_id
        return tokens
