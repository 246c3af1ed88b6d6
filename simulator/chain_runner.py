"""The modelled step: computes tokens from the KV that is present, at once or, as a device that runs ahead
does, when it is collected."""

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from ..core.messages import TokenLogprobs
from ..engine.batch import Batch, CompletedStep, Launched, SampledToken, ScheduledChunk
from ..engine.block_pool import BlockPool
from ..engine.sequence import Sequence
from .kv_model import NUM_LAYERS, ChainStore, chain, prompt_logprob, salted, sample


class StepCost(Protocol):
    """The duration of a step; `spend` advances the worker's clock."""

    def __call__(self) -> float: ...
    def spend(self, seconds: float) -> None: ...
    def of(self, num_tokens: int) -> float: ...


OnSample = Callable[
    [Sequence, int, int], None
]  # called with (sequence, choice, index) of each token that is computed


@dataclass(frozen=True)
class _Row:
    """A chunk as it was when it was launched."""

    chunk: ScheduledChunk
    token_ids: tuple[int, ...]  # without a pending one
    block_ids: tuple[int, ...]
    index: int  # of the token to be drawn
    draws: bool
    wants_prompt_logprobs: bool

    @classmethod
    def of(cls, chunk: ScheduledChunk) -> "_Row":
        seq = chunk.sequence
        known = tuple(seq.token_ids[chunk.start : chunk.end])
        draws = seq.may_sample or not chunk.choices
        return cls(
            chunk, known, tuple(seq.block_ids), seq.num_output_tokens, draws, seq.wants_prompt_logprobs
        )


class _Later:
    """A step that is computed when it is collected: until then, its blocks must remain its own."""

    def __init__(self, compute: Callable[[], list[list[SampledToken]]]) -> None:
        self._compute = compute

    def collect(self) -> list[list[SampledToken]]:
        return self._compute()


class ChainRunner:
    """Implements `engine.batch.Runner`. Prompts are computed at once even when it runs ahead: their KV is
    sent layer by layer. Each of the instance's ranks has a store."""

    def __init__(
        self,
        stores: Seq[ChainStore],
        pool: BlockPool,
        cost: StepCost,
        on_sample: OnSample,
        runs_ahead: bool = False,
    ) -> None:
        self.runs_ahead = runs_ahead
        self._stores = stores
        self._on_sample = on_sample
        self._size = pool.block_size
        self._cost = cost
        self._prompts: WeakKeyDictionary[Sequence, list[TokenLogprobs]] = WeakKeyDictionary()
        # the last token, as kept on a device
        self._drawn: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched:
        if before_sampling is not None:
            before_sampling()
        rows = [_Row.of(chunk) for chunk in batch.chunks]
        if self.runs_ahead and on_layer is None:
            return _Later(lambda: self._compute(batch, rows, None))
        return CompletedStep(self._compute(batch, rows, on_layer))

    def _compute(
        self, batch: Batch, rows: list[_Row], on_layer: Callable[[int], None] | None
    ) -> list[list[SampledToken]]:
        for source, copy in batch.copies:
            for store in self._stores:
                store.copy_block(source, copy)
        duration_s = self._cost.of(batch.num_tokens)
        states = [self._states(row) for row in rows]
        for row in rows:
            chunk = row.chunk
            table = row.block_ids[chunk.start // self._size : -(-chunk.end // self._size)]
            self._stores[0].check_writable(table, chunk.sequence)
            self._stores[0].check_held(row.block_ids, chunk.sequence)
        for layer in range(NUM_LAYERS):
            self._cost.spend(duration_s / NUM_LAYERS)
            final_s = self._cost()
            for row, words in zip(rows, states, strict=True):
                for position, word in enumerate(words, row.chunk.start):
                    block_id, offset = row.block_ids[position // self._size], position % self._size
                    for store in self._stores:
                        store.write(layer, block_id, offset, word, final_s)
            if on_layer is not None:
                on_layer(layer)
        return [self._tokens(row) if row.draws else [] for row in rows]

    def _tokens(self, row: _Row) -> list[SampledToken]:
        chunk, seq = row.chunk, row.chunk.sequence
        prompt = self._prompt_logprobs(chunk) if row.wants_prompt_logprobs else ()
        tokens = []
        for choice in chunk.choices:
            self._drawn[seq] = token_id = self._sample(row, choice)
            tokens.append(SampledToken(token_id, prompt_logprobs=prompt if choice == 0 else ()))
        return tokens

    def _prompt_logprobs(self, chunk: ScheduledChunk) -> tuple[TokenLogprobs, ...]:
        """Returns log probabilities of the tokens computed here without a gap: the engine knows no others."""
        gathered = self._prompts.setdefault(chunk.sequence, [])
        del gathered[chunk.start :]
        gathered += (
            prompt_logprob(token_id) for token_id in chunk.sequence.token_ids[chunk.start + 1 : chunk.end + 1]
        )
        return tuple(gathered)

    def _states(self, row: _Row) -> list[int]:
        seq, start = row.chunk.sequence, row.chunk.start
        token_ids = row.token_ids or (self._drawn[seq],)
        state = self._stores[0].word(row.block_ids, start - 1) if start else salted(seq.spec.cache_salt)
        states = []
        for token_id in token_ids:
            state = chain(state, token_id)
            states.append(state)
        return states

    def _sample(self, row: _Row, choice: int) -> int:
        seq = row.chunk.sequence
        totals = [total for store in self._stores for total in store.totals(row.block_ids, row.chunk.end)]
        self._on_sample(seq, choice, row.index)
        total = totals[0] if all(other == totals[0] for other in totals) else chain(totals[0], totals[-1])
        return sample(total, seed_of(seq), choice, row.index)


def seed_of(seq: Sequence) -> int:
    return seq.spec.sampling.seed
