"""The utilisation of both pools: the seconds of work that come per second, over those that a pool offers.

What prompts ask of prefill instances, and outputs of decode instances with the largest batch within the ITL
objective and their KV, is arithmetic over the learnt durations; so all ratios are compared, and replays are
spared for those that may be better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..core.messages import Role
from ..router.planning import Ratio, SeenRequest, Summary
from .durations import Durations

LEAST = 1e-12


@dataclass(frozen=True)
class Demand:
    """Seconds of an instance's work per second."""

    prefill: float
    decode: float
    capacities: dict[Role, float]  # of a mean instance of the pool, relative to one of factor 1

    @property
    def mix(self) -> float:
        """Returns the share of prompts in all work."""
        return self.prefill / max(self.prefill + self.decode, LEAST)

    def utilisation(self, ratio: Ratio) -> float:
        """Returns that of the busier pool; a pool of none has no limit, as the other stands in for it."""
        prefill = ratio.num_prefill * self.capacities[Role.PREFILL]
        decode = ratio.num_decode * self.capacities[Role.DECODE]
        if not prefill or not decode:
            return (self.prefill + self.decode) / (prefill + decode)
        return max(self.prefill / prefill, self.decode / decode)


def demand(
    summary: Summary, requests: Sequence[SeenRequest], rate: float, backlog: Sequence[SeenRequest]
) -> Demand:
    """Returns that of `requests` at `rate`, with a `backlog` that is worked off within a horizon."""
    durations = Durations.learnt(summary.latency)
    token_s = _output_token_s(summary, durations, requests)
    horizon_s = summary.terms.horizon_s

    def per_second(work: Callable[[SeenRequest], float]) -> float:
        return rate * fmean(map(work, requests)) + sum(map(work, backlog)) / horizon_s

    chunk = summary.terms.prefill.max_batch_tokens
    return Demand(
        per_second(lambda one: _prompt_s(durations, one, chunk)),
        per_second(lambda one: token_s * one.num_output_tokens),
        {
            Role.PREFILL: 1 / fmean(one.prefill_factor for one in summary.instances),
            Role.DECODE: 1 / fmean(one.decode_factor for one in summary.instances),
        },
    )


def _prompt_s(durations: Durations, one: SeenRequest, chunk: int) -> float:
    new = max(0, one.num_prompt_tokens - one.num_cached_tokens)
    squares = new * (one.num_cached_tokens + new / 2 + min(new, chunk) / 2)
    steps = new / chunk  # short prompts share a step
    return (
        durations.prefill_step_s * steps
        + durations.prefill_token_s * new
        + durations.prefill_square_s * squares
    )


def _output_token_s(summary: Summary, durations: Durations, requests: Sequence[SeenRequest]) -> float:
    """Returns the seconds of a decode instance that a token of output takes, with the largest batch."""
    terms = summary.terms
    num_tokens = max(1, sum(one.num_output_tokens for one in requests))
    context = (
        sum(one.num_output_tokens * (one.num_prompt_tokens + one.num_output_tokens / 2) for one in requests)
        / num_tokens
    )
    num_blocks = fmean(one.num_blocks for one in summary.instances)
    fit = int(num_blocks * terms.layout.block_size / max(1.0, context))
    batch = max(1, min(terms.decode.max_batch_size, fit))
    while batch > 1 and durations.decode_s(batch, batch * context) > terms.itl_slo_s:
        batch -= 1
    return durations.decode_s(batch, batch * context) / batch
