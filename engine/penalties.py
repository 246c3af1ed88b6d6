"""Edits a request's logits before a token is drawn: by its bias, then by the sequence's tokens so far
(repetition, presence, frequency), and by which tokens are allowed at all, under min_tokens and a grammar.

`Penalties.apply` edits a row on the host, `logit_edits.py` rows on a GPU, from the definitions here."""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from ..core.request import SamplingParams
from .distribution import Floats, Indices
from .sequence import Sequence, has_penalties
from .token_masks import allowed_bits, unpacked

Bits = npt.NDArray[np.uint8]
Numbers = TypeVar("Numbers", Floats, torch.Tensor)


class TokenCounts:
    """The distinct tokens of one sequence and how often each occurs in its output, extended token by
    token."""

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._num_seen = 0

    @property
    def ids(self) -> Indices:
        return self._ids[: len(self._slot_of)]

    @property
    def counts(self) -> Floats:
        """Returns the counts of `ids`; 0 for tokens that only the prompt has."""
        return self._counts[: len(self._slot_of)]

    def update(self, seq: Sequence) -> None:
        for position in range(self._num_seen, seq.num_tokens):
            slot = self._slot(seq.token_ids[position])
            if position >= seq.num_prompt_tokens:
                self._counts[slot] += 1
        self._num_seen = seq.num_tokens

    def _slot(self, token_id: int) -> int:
        slot = self._slot_of.get(token_id)
        if slot is None:
            slot = self._slot_of[token_id] = len(self._slot_of)
            if slot == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[slot] = token_id
        return slot


class Penalties:
    """Applies the edits that sequences' parameters ask for; remembers counts and biases as long as a sequence
    exists."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._biases: WeakKeyDictionary[Sequence, tuple[Indices, Floats]] = WeakKeyDictionary()

    def apply(self, seq: Sequence, logits: Floats) -> None:
        """Adjusts one row of logits [V] in place."""
        if bias := self.bias(seq):
            token_ids, values = bias
            logits[token_ids] += values
        if seen := self.seen(seq):
            strengths = strengths_of(seq.spec.sampling)[:, None]
            logits[seen.ids] = penalised(logits[seen.ids], seen.counts, strengths, np.where)
        endings, bits = restriction(seq, len(logits))
        if endings:
            logits[endings] = -np.inf
        if bits is not None:
            logits[~unpacked(bits, len(logits))] = -np.inf

    def bias(self, seq: Sequence) -> tuple[Indices, Floats] | None:
        """Returns token ids, each once, and the biases to add to their logits."""
        if not seq.spec.sampling.logit_bias:
            return None
        bias = self._biases.get(seq)
        if bias is None:
            token_ids, values = zip(*seq.spec.sampling.logit_bias, strict=True)
            bias = self._biases[seq] = np.array(token_ids, dtype=np.intp), np.array(values, dtype=np.float32)
        return bias

    def seen(self, seq: Sequence) -> TokenCounts | None:
        """Returns the tokens so far, when they are penalised."""
        if not has_penalties(seq.spec.sampling):
            return None
        counts = self._counts.get(seq)
        if counts is None:
            counts = self._counts[seq] = TokenCounts()
        counts.update(seq)
        return counts


def is_adjusted(seq: Sequence) -> bool:
    """Returns whether anything here edits the logits of the sequence's next token."""
    return seq.depends_on_tokens or bool(seq.spec.sampling.logit_bias) or must_go_on(seq)


def strengths_of(sampling: SamplingParams) -> Floats:
    """Returns float32 [3], in the form that `penalised` takes."""
    return np.array(
        (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty), dtype=np.float32
    )


def penalised(
    logits: Numbers, counts: Numbers, strengths: Numbers, where: Callable[[Any, Any, Any], Numbers]
) -> Numbers:
    """Returns the new logits of tokens that the sequence has, `counts` times in its output; float32
    throughout, operation by operation.

    `strengths` [3, N or 1] are those of repetition, frequency and presence; an array, as torch divides by a
    number by way of its reciprocal. Repetition considers prompt and output (arXiv 1909.05858, section 4.1),
    the others the output alone."""
    repetition, frequency, presence = strengths
    logits = where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - frequency * counts
    logits -= presence * (counts > 0)
    return logits


def restriction(seq: Sequence, vocab_size: int) -> tuple[list[int], Bits | None]:
    """Returns tokens that may not come next, and a mask (see `allowed_bits`) of those that may, None: all
    others. What a grammar demands comes all the same: an output that is complete by it ends, also before
    min_tokens, and a bad word that is all that may follow does."""
    bits = allowed_bits(seq, vocab_size)
    barred = seq.forbidden_token_ids
    if must_go_on(seq):
        barred += seq.stop_token_ids
    barred = [token_id for token_id in barred if token_id < vocab_size]
    if bits is None or not barred:
        return barred, bits
    others = bits.copy()
    for token_id in barred:
        others[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
    return [], others if unpacked(others, vocab_size).any() else bits


def must_go_on(seq: Sequence) -> bool:
    """Returns whether the next token may not be one that ends the sequence."""
    return seq.num_output_tokens < seq.spec.sampling.min_tokens
