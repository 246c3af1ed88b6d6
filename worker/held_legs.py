"""What a worker can tell a router that knows nothing of it: the legs it carries out, those that ended lately,
and their tokens.

A router that dies takes with it what it knew of its requests. The one that follows learns from here what has
been computed, so that nothing is computed twice: also of legs whose end the dead one may have heard of
without telling its client, and of those that it aborted to go on elsewhere."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..core.messages import HeldLeg, Leg, LegEnded, TokenOutput
from ..core.request import SequenceSpec, TransferId

KEPT_S = 30.0  # after its end
MAX_KEPT_TOKENS = 1 << 18  # of all ended legs together, prompts and their log probabilities included
MAX_FRAME_TOKENS = 1 << 15  # told at once: some 10 MB with the log probabilities of 20 tokens each


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
        return _weight(self.spec) + len(self.outputs) + self.num_prompt_logprobs


class HeldLegs:
    """Owned by the engine thread, like the worker whose legs these are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[TransferId, _RememberedLeg] = {}
        self._ended: deque[_RememberedLeg] = deque()  # oldest end first
        self._num_kept_tokens = 0  # of those

    def accepted(self, spec: SequenceSpec, leg: Leg, *, has_partner: bool) -> None:
        """The worker was given a leg; again, when the command came twice."""
        self._open.setdefault(spec.transfer, _RememberedLeg(spec, leg, has_partner))

    def told(self, outputs: Iterable[TokenOutput], ended: Iterable[LegEnded]) -> None:
        """What the worker says to whichever router listens."""
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

    def tell(self) -> tuple[HeldLeg, ...]:
        """Everything, for a router that has just been met."""
        self._forget()
        return tuple(
            HeldLeg(
                spec=leg.spec,
                leg=leg.leg,
                has_partner=leg.has_partner,
                outputs=tuple(leg.outputs),
                ended=leg.ended,
            )
            for leg in (*self._ended, *self._open.values())
        )

    def _forget(self) -> None:
        """Ended legs that are too old or too many."""
        oldest_s = self._clock() - KEPT_S
        while self._ended and (self._ended[0].ended_s < oldest_s or self._num_kept_tokens > MAX_KEPT_TOKENS):
            self._num_kept_tokens -= self._ended.popleft().num_tokens


def _num_prompt_logprobs(output: TokenOutput) -> int:
    return sum(1 + len(token.top) for token in output.prompt_logprobs)


def in_frames(legs: Sequence[HeldLeg], max_tokens: int = MAX_FRAME_TOKENS) -> Iterator[tuple[HeldLeg, ...]]:
    """All of them in turn, at least once, no more at a time than a frame can hold."""
    frame: list[HeldLeg] = []
    num_tokens = 0
    for leg in legs:
        num_leg_tokens = _weight(leg.spec) + len(leg.outputs) + sum(map(_num_prompt_logprobs, leg.outputs))
        if frame and num_tokens + num_leg_tokens > max_tokens:
            yield tuple(frame)
            frame, num_tokens = [], 0
        frame.append(leg)
        num_tokens += num_leg_tokens
    yield tuple(frame)


def _weight(spec: SequenceSpec) -> int:
    """In tokens, of some four bytes: a client may send much besides them."""
    sampling = spec.sampling
    num_chars = len(sampling.grammar) + sum(map(len, sampling.stop))
    return spec.num_tokens + num_chars // 4 + 3 * len(sampling.logit_bias)
