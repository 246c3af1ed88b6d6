"""Remembers what a worker reports to a router that knows nothing of it: its open legs, those that ended
recently, and their tokens.

A router that dies loses its knowledge of its requests. Its successor learns from this report which tokens
have been computed, so that nothing is computed twice: including legs whose end the dead router may have
received without informing its client, and legs that it aborted to continue elsewhere."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..core.messages import HeldLeg, Leg, LegEnded, TokenOutput
from ..core.request import SamplingParams, SequenceSpec, TransferId

KEPT_S = 30.0  # after the leg's end
MAX_KEPT_TOKENS = 1 << 18  # of all ended legs together, prompts and their log probabilities included
LEG_TOKENS = 64  # as many as a leg weighs, beside its tokens
MAX_FRAME_TOKENS = 1 << 15  # sent at once: some 10 MB with the log probabilities of 20 tokens each


@dataclass(slots=True)
class _RememberedLeg:
    spec: SequenceSpec
    leg: Leg
    has_partner: bool
    outputs: list[TokenOutput] = field(default_factory=list)
    ended: LegEnded | None = None
    ended_s: float = 0.0
    num_prompt_logprobs: int = 0  # alternatives included

    @property
    def num_tokens(self) -> int:
        return (
            self.spec.num_tokens + _weight(self.spec.sampling) + len(self.outputs) + self.num_prompt_logprobs
        )


class HeldLegs:
    """Owned by the engine thread, like the worker whose legs these are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[TransferId, _RememberedLeg] = {}
        self._ended: deque[_RememberedLeg] = deque()  # oldest end first
        self._num_kept_tokens = 0  # of the ended legs

    def accepted(self, spec: SequenceSpec, leg: Leg, *, has_partner: bool) -> None:
        """The worker has accepted a leg; called again for a duplicate command."""
        self._open.setdefault(spec.transfer, _RememberedLeg(spec, leg, has_partner))

    def record(self, outputs: Iterable[TokenOutput], ended: Iterable[LegEnded]) -> None:
        """Records the worker's reports to the current router."""
        for output in outputs:
            if (leg := self._open.get(output.transfer)) is not None:
                leg.outputs.append(output)
                leg.num_prompt_logprobs += _num_prompt_logprobs(output)
        for end in ended:
            if (leg := self._open.pop(end.transfer, None)) is not None:
                leg.ended, leg.ended_s = end, self._clock()
                self._ended.append(leg)
                self._num_kept_tokens += leg.num_tokens
        if self._ended:
            self._forget()

    def all(self) -> tuple[HeldLeg, ...]:
        """Returns all legs, for a newly connected router."""
        self._forget()
        return tuple(
            HeldLeg.of(leg.spec, leg.leg, leg.outputs, has_partner=leg.has_partner, ended=leg.ended)
            for leg in (*self._ended, *self._open.values())
        )

    def _forget(self) -> None:
        """Forgets ended legs that are too old or too many."""
        oldest_s = self._clock() - KEPT_S
        while self._ended and (self._ended[0].ended_s < oldest_s or self._num_kept_tokens > MAX_KEPT_TOKENS):
            self._num_kept_tokens -= self._ended.popleft().num_tokens


def _num_prompt_logprobs(output: TokenOutput) -> int:
    return sum(1 + len(token.top) for token in output.prompt_logprobs)


def in_frames(legs: Sequence[HeldLeg], max_tokens: int = MAX_FRAME_TOKENS) -> Iterator[tuple[HeldLeg, ...]]:
    """Yields all legs in turn, at least once, each time at most as many as fit a frame."""
    frame: list[HeldLeg] = []
    num_tokens = 0
    for leg in legs:
        num_logprobs = sum(map(_num_prompt_logprobs, leg.later_outputs))
        num_leg_tokens = LEG_TOKENS + leg.spec.num_output_tokens + _weight(leg.spec.sampling)
        num_leg_tokens += leg.num_outputs + num_logprobs
        if frame and num_tokens + num_leg_tokens > max_tokens:
            yield tuple(frame)
            frame, num_tokens = [], 0
        frame.append(leg)
        num_tokens += num_leg_tokens
    yield tuple(frame)


def _weight(sampling: SamplingParams) -> int:
    """Returns the weight in tokens, of some four bytes each: a client may send much besides tokens."""
    num_chars = len(sampling.grammar) + sum(map(len, sampling.stop))
    num_bad = sum(1 + len(word) for word in sampling.bad_words)
    return num_chars // 4 + 3 * len(sampling.logit_bias) + num_bad
