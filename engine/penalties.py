"""What a request does to its logits before a token is drawn: its bias, then what depends on the tokens that the sequence has so
far: repetition, presence, frequency, and which tokens may come at all, by min_tokens and by a grammar."""

from weakref import WeakKeyDictionary

import numpy as np

from ..core.request import SamplingParams
from .distribution import Floats, Indices
from .sequence import Sequence
from .token_masks import allowed_tokens


class TokenCounts:
    """The distinct tokens of one sequence and how often each is in its output, extended as tokens come."""

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._num_seen = 0

    def update(self, seq: Sequence) -> None:
        for position in range(self._num_seen, seq.num_tokens):
            slot = self._slot(seq.token_ids[position])
            if position >= seq.num_prompt_tokens:
                self._counts[slot] += 1
        self._num_seen = seq.num_tokens

    def penalise(self, logits: Floats, sampling: SamplingParams) -> None:
        """In place. Repetition looks at prompt and output (arXiv 1909.05858, section 4.1), the others at the output alone."""
        num_ids = len(self._slot_of)
        ids, counts = self._ids[:num_ids], self._counts[:num_ids]
        seen = logits[ids]
        factor = np.float32(sampling.repetition_penalty)
        seen = np.where(seen > 0, seen / factor, seen * factor)
        seen -= np.float32(sampling.frequency_penalty) * counts
        seen -= np.float32(sampling.presence_penalty) * (counts > 0)
        logits[ids] = seen

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
    """Applies what a sequence's parameters ask for; remembers counts and biases as long as the sequence lives."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._biases: WeakKeyDictionary[Sequence, tuple[Indices, Floats]] = WeakKeyDictionary()

    def apply(self, seq: Sequence, logits: Floats) -> None:
        """Adjust one row of logits [V] in place."""
        sampling = seq.spec.sampling
        if sampling.logit_bias:
            token_ids, biases = self._bias(seq)
            logits[token_ids] += biases
        if has_penalties(sampling):
            counts = self._counts.get(seq)
            if counts is None:
                counts = self._counts[seq] = TokenCounts()
            counts.update(seq)
            counts.penalise(logits, sampling)
        _restrict(seq, logits)

    def _bias(self, seq: Sequence) -> tuple[Indices, Floats]:
        bias = self._biases.get(seq)
        if bias is None:
            token_ids, values = zip(*seq.spec.sampling.logit_bias, strict=True)
            bias = self._biases[seq] = np.array(token_ids, dtype=np.intp), np.array(values, dtype=np.float32)
        return bias


def has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _restrict(seq: Sequence, logits: Floats) -> None:
    """Rule out tokens. What is complete by its grammar ends, also before min_tokens."""
    allowed = allowed_tokens(seq, len(logits))
    if must_go_on(seq):
        endings = [token_id for token_id in seq.stop_token_ids if token_id < len(logits)]
        if allowed is None:
            logits[endings] = -np.inf
        else:
            going_on = allowed.copy()
            going_on[endings] = False
            allowed = going_on if going_on.any() else allowed
    if allowed is not None:
        logits[~allowed] = -np.inf


def must_go_on(seq: Sequence) -> bool:
    """Whether the next token may not be one that ends the sequence."""
    return seq.num_output_tokens < seq.spec.sampling.min_tokens
