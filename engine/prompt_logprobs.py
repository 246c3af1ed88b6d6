"""Log probabilities of prompt tokens, gathered chunk by chunk while the prompt is computed."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from msgspec.structs import replace

from ..core.messages import TokenLogprobs
from .batch import SampledToken, ScheduledChunk
from .distribution import Floats, best_tokens, log_sum_exp
from .model import Model
from .sequence import Sequence

_NUM_ROWS = 64  # logits at a time: a whole chunk of them can be larger than the model


def prompt_rows(chunks: tuple[ScheduledChunk, ...]) -> Iterator[tuple[ScheduledChunk, range]]:
    """Yields the chunks of sequences that ask for log probabilities of their prompt, each with the rows of
    the batch that yield one."""
    row = 0
    for chunk in chunks:
        if chunk.sequence.wants_prompt_logprobs:
            num_rows = min(chunk.end, chunk.sequence.num_prompt_tokens - 1) - chunk.start
            yield chunk, range(row, row + num_rows)
        row += chunk.num_tokens


def pieces(rows: range) -> Iterator[range]:
    """Yields the rows whose logits are computed at once, one range after another."""
    for first in range(rows.start, rows.stop, _NUM_ROWS):
        yield range(first, min(first + _NUM_ROWS, rows.stop))


class PromptLogprobs:
    """The log probabilities gathered so far for each sequence that asks for them, as long as it exists."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._gathered: WeakKeyDictionary[Sequence, list[TokenLogprobs]] = WeakKeyDictionary()

    def add(self, chunks: tuple[ScheduledChunk, ...], hidden: torch.Tensor) -> None:
        """`hidden` [T, H] are the final states of all tokens of the chunks; each yields the log probability
        of the token that follows."""
        for chunk, rows in prompt_rows(chunks):
            self._add(chunk, hidden, rows)

    @property
    def is_empty(self) -> bool:
        return not self._gathered

    def complete(self, chunk: ScheduledChunk, tokens: list[SampledToken]) -> list[SampledToken]:
        """Returns the log probabilities that go with the first token of choice 0: one for each token of the
        prompt but the first, which follows nothing."""
        if not tokens or chunk.sequence not in self._gathered:
            return tokens
        logprobs = tuple(self._gathered.pop(chunk.sequence))
        first = chunk.choices.index(0)
        return [*tokens[:first], replace(tokens[first], prompt_logprobs=logprobs), *tokens[first + 1 :]]

    def _add(self, chunk: ScheduledChunk, hidden: torch.Tensor, rows: range) -> None:
        seq, num_top = chunk.sequence, chunk.sequence.spec.sampling.prompt_logprobs
        assert num_top is not None
        if chunk.start == 0:
            self._gathered[seq] = []
        gathered = self._gathered[seq]
        assert len(gathered) == chunk.start, f"{seq}: a part of the prompt came from elsewhere"
        for piece in pieces(rows):
            for row in self._model.logits(hidden[piece.start : piece.stop]).cpu().numpy():
                gathered.append(_logprobs(row, seq.token_ids[len(gathered) + 1], num_top))


def _logprobs(logits: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    normaliser = log_sum_exp(logits)
    best = best_tokens(logits, num_top) if num_top > 0 else ()
    top = tuple((int(other), float(logits[other]) - normaliser) for other in best)
    return TokenLogprobs(float(logits[token_id]) - normaliser, top)
