"""What placement weighs and what it decides: values, with the predictions that they rest on."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from .events import ConsideredPlace
from .registry import RegisteredWorker

NUM_KEPT = 4  # candidates whose predictions go with a placement


@dataclass(slots=True)
class PrefillOption:
    """A worker seen as the one that prefills the job."""

    worker: RegisteredWorker
    num_cached_tokens: int
    num_new_tokens: int
    queue_s: float
    compute_s: float
    stall_s: float  # gap that this prefill makes in streams which the worker decodes; 0 when there are none

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.compute_s


Score = tuple[bool, float, float, float, str, str]  # failed before, ITL above the SLO, cost, load, names
Candidate = tuple[
    Score, PrefillOption, RegisteredWorker | None, float, float
]  # with predicted ITL, and exposed transfer


class RoutingDecision(msgspec.Struct, frozen=True):
    """A decision. `decode` is None when the prefill's token is the last; equal to `prefill`: one worker
    serves."""

    prefill: RegisteredWorker
    decode: RegisteredWorker | None
    num_cached_tokens: int
    num_new_tokens: int
    prefill_s: float
    queue_s: float
    transfer_s: float = 0.0  # what of it comes after the prefill
    itl_s: float = 0.0
    best: Sequence[Candidate] = ()  # the chosen one and those next to it

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s

    def considered(self) -> tuple[ConsideredPlace, ...]:
        """`best`, for people."""
        return tuple(_considered(candidate) for candidate in self.best)


def _considered(candidate: Candidate) -> ConsideredPlace:
    (has_failed, itl_excess_s, cost_s, load, _, _), option, decode, _, _ = candidate
    return ConsideredPlace(
        prefill_worker=option.worker.worker_id,
        decode_worker=decode.worker_id if decode else None,
        has_failed=has_failed,
        itl_excess_s=itl_excess_s,
        cost_s=cost_s,
        load=load,
        ttft_s=option.ttft_s,
    )
