"""The options that placement weighs and its decisions: values, with the predictions behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from .events import ConsideredPlace
from .registered_worker import RegisteredWorker

NUM_KEPT = 4  # candidates whose predictions go with a placement


@dataclass(slots=True)
class PrefillOption:
    """A worker considered for the job's prefill."""

    worker: RegisteredWorker
    num_cached_tokens: int
    num_new_tokens: int
    queue_s: float
    compute_s: float
    stall_s: float  # gap that this prefill causes in streams that the worker decodes; 0 when there are none

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.compute_s


# failed before, its workers that did, ITL above the SLO, cost, load, names
Score = tuple[bool, int, float, float, float, str, str]
Candidate = tuple[
    Score, PrefillOption, RegisteredWorker | None, float, float
]  # with predicted ITL, and exposed transfer


class RoutingDecision(msgspec.Struct, frozen=True):
    """A placement decision. `decode` is None when the prefill's token is the last, and equals `prefill` when
    one worker serves both phases."""

    prefill: RegisteredWorker
    decode: RegisteredWorker | None
    num_cached_tokens: int
    num_new_tokens: int
    prefill_s: float
    queue_s: float
    transfer_s: float = 0.0  # the part of it that remains exposed after the prefill
    itl_s: float = 0.0
    exceeds_itl: bool = False  # streams there are predicted to miss the SLO
    best: Sequence[Candidate] = ()  # the chosen candidate and the runners-up

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s

    def considered(self) -> tuple[ConsideredPlace, ...]:
        """Returns `best` in human-readable form."""
        return tuple(_considered(candidate) for candidate in self.best)


def _considered(candidate: Candidate) -> ConsideredPlace:
    (has_failed, _, itl_excess_s, cost_s, load, _, _), option, decode, _, _ = candidate
    return ConsideredPlace(
        prefill_worker=option.worker.worker_id,
        decode_worker=decode.worker_id if decode else None,
        has_failed=has_failed,
        itl_excess_s=itl_excess_s,
        cost_s=cost_s,
        load=load,
        ttft_s=option.ttft_s,
    )
