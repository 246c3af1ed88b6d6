"""Gathers the reports of a worker's roles to the router until the end of a step, to be sent as one frame."""

from dataclasses import dataclass, field

from ..core.failures import FailureKind
from ..core.messages import Leg, LegEnded, StepTiming, TokenOutput, TransferStats
from ..core.request import FinishReason, TransferId
from .batch import SampledToken
from .sequence import Sequence


@dataclass(slots=True)
class LegClock:
    """The times at which one leg of a dispatch was accepted, first took part in a step, and was last computed
    on."""

    accepted_s: float
    started_s: float | None = None
    computed_s: float | None = None

    def start(self, now_s: float) -> None:
        if self.started_s is None:
            self.started_s = now_s

    def durations(self, now_s: float) -> tuple[float, float]:
        """Returns (waiting, working) seconds. A leg that computes to its end has worked until now."""
        started_s = now_s if self.started_s is None else self.started_s
        return started_s - self.accepted_s, (self.computed_s or now_s) - started_s


@dataclass
class Outbox:
    """Filled on the engine thread by both roles, emptied by the process that hosts them."""

    worker_id: str
    incarnation: int
    outputs: list[TokenOutput] = field(default_factory=list)
    ended: list[LegEnded] = field(default_factory=list)
    timings: list[StepTiming] = field(default_factory=list)

    def token(
        self, seq: Sequence, choice: int, index: int, token: SampledToken, reason: FinishReason | None
    ) -> TokenOutput:
        """Adds one token of a choice, the last one when `reason` is given."""
        output = TokenOutput(
            seq.transfer,
            choice,
            index,
            token.token_id,
            reason,
            token.logprob,
            token.top_logprobs,
            token.prompt_logprobs,
        )
        self.outputs.append(output)
        return output

    def leg_ended(
        self,
        transfer: TransferId,
        leg: Leg,
        clock: LegClock,
        now_s: float,
        *,
        error: str | None = None,
        kind: FailureKind | None = None,
        num_cached_tokens: int = 0,
        stats: TransferStats | None = None,
    ) -> None:
        """The worker no longer holds anything for this leg."""
        queue_s, compute_s = clock.durations(now_s)
        self.ended.append(
            LegEnded(
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                transfer=transfer,
                leg=leg,
                error=error,
                kind=kind,
                num_cached_tokens=num_cached_tokens,
                queue_s=queue_s,
                compute_s=compute_s,
                stats=stats,
            )
        )

    def take(self) -> tuple[tuple[TokenOutput, ...], tuple[LegEnded, ...], tuple[StepTiming, ...]]:
        """Returns the reports gathered since the last call."""
        taken = tuple(self.outputs), tuple(self.ended), tuple(self.timings)
        self.outputs, self.ended, self.timings = [], [], []
        return taken
