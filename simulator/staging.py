"""A sound cluster and plain requests, from which staged scenarios are made."""

from dataclasses import replace
from random import Random

from ..core.messages import Role
from ..core.request import Request, SamplingParams
from .faults import FaultRates
from .kv_model import VOCABULARY
from .scenario import (
    MAX_MODEL_LEN,
    PlannedRequest,
    Scenario,
)
from .simulated_hosts import PlannedHost

SOON_S = 1.0  # deadline for the first token of a request that others must not delay
ONE_EACH = {Role.PREFILL: 1, Role.DECODE: 1}


def staged(
    scenario: Scenario,
    *,
    num_blocks: int = 10 * MAX_MODEL_LEN,
    max_batch_size: int = 16,
    step_s: float = 0.03,
) -> Scenario:
    """Returns a scenario without faults or refusals, on one host and with equal workers of this size."""
    return replace(
        scenario,
        shapes={
            role: replace(
                shape,
                num_blocks=num_blocks,
                block_size=4,
                max_batch_tokens=256,
                max_batch_size=max_batch_size,
                step_s=step_s,
            )
            for role, shape in scenario.shapes.items()
        },
        hosts=(PlannedHost(64, 0.0),),
        start_s=0.1,
        rates=FaultRates(),
        accidents=(),
        max_queued_requests=1024,
    )


def plain_request(
    rng: Random, request_id: str, client: str, at_s: float, max_tokens: int, n: int, *, num_tokens: int = 9
) -> PlannedRequest:
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(rng.randrange(VOCABULARY) for _ in range(num_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, n=n, seed=rng.getrandbits(32)),
        client=client,
    )
    return PlannedRequest(at_s, request)
