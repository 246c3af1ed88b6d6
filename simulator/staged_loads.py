"""Scenarios without faults in which one request or client must not suffer from others."""

from dataclasses import replace
from random import Random

import msgspec

from ..core.messages import Role
from ..router.fair_queue import OUTPUT_TOKEN
from .faults import FaultRates
from .scenario import (
    CONTEST_TOKENS,
    MAX_MODEL_LEN,
    Inequality,
    PlannedRequest,
    Scenario,
)
from .staging import ONE_EACH, SOON_S, plain_request, staged


def with_greedy_client(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which one client has twice as many long streams as there are
    places; others arrive later."""
    max_batch_size = rng.choice((2, 4, 16))
    shapes = {
        role: replace(
            shape,
            num_blocks=10 * MAX_MODEL_LEN // shape.block_size,
            max_batch_size=max_batch_size,
            step_s=0.03,
        )
        for role, shape in scenario.shapes.items()
    }
    n = 1 if max_batch_size == 2 else rng.choice((1, 2))
    num_greedy = 2 * max_batch_size * scenario.pools[Role.DECODE] // n
    greedy = [plain_request(rng, f"greedy{number}", "greedy", 0.0, 110, n) for number in range(num_greedy)]
    modest = [
        plain_request(rng, f"modest{number}", f"c{number}", rng.uniform(2.5, 4.0), 5, 1)
        for number in range(3)
    ]
    return replace(
        scenario,
        shapes=shapes,
        rates=FaultRates(),
        accidents=(),
        max_queued_requests=1024,
        requests=(*greedy, *(replace(plan, first_token_within_s=SOON_S) for plan in modest)),
    )


def with_contest(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which each of some clients has more queued than one worker can
    serve: prompts, outputs, choices and weights differ from client to client."""
    clients = [f"c{number}" for number in range(rng.choice((2, 2, 3)))]
    weights = {client: rng.choice((1.0, 1.0, 2.0)) for client in clients}
    requests: list[PlannedRequest] = []
    for client in clients:
        num_tokens, max_tokens, n = rng.choice(((9, 20, 2), (60, 5, 1), (30, 15, 1)))
        cost = num_tokens + OUTPUT_TOKEN * max_tokens * n
        # one that needs few turns for its share must not run out first
        num_requests = int(2.0 * CONTEST_TOKENS * weights[client] / cost)
        requests += [
            _weighted(
                plain_request(rng, f"{client}.{number}", client, 2.0, max_tokens, n, num_tokens=num_tokens),
                weights[client],
            )
            for number in range(num_requests)
        ]
    return replace(
        staged(scenario, max_batch_size=2, step_s=0.01),
        pools=ONE_EACH,
        prefill_on_decode=False,
        requests=tuple(requests),
        contest=tuple(clients),
    )


def _weighted(plan: PlannedRequest, weight: float) -> PlannedRequest:
    return replace(plan, request=msgspec.structs.replace(plan.request, weight=weight))


def with_crowd(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which three clients always have something queued, and one more
    request comes: a small one of a fourth client, one of lower priority, or a large one of the first, which
    may have many small ones as well."""
    start_s = 2.0
    client, num_tokens, priority = rng.choice((("c3", 9, 0), ("c3", 9, 7), ("c0", 100, 0)))
    is_flood = client == "c0" and rng.random() < 0.5
    crowd = [
        plain_request(rng, f"{name}.{number}", name, start_s + 2.0 * (number >= 5), rng.randint(3, 9), 1)
        for name in ("c0", "c1", "c2")
        for number in range(5 if name == client and not is_flood else 40)
    ]
    one = plain_request(rng, "one", client, start_s + rng.uniform(0.1, 1.0), 5, 1, num_tokens=num_tokens)
    return replace(
        staged(scenario, num_blocks=30, max_batch_size=4, step_s=0.1),
        pools=ONE_EACH,
        prefill_on_decode=False,
        requests=(*crowd, _prioritised(replace(one, is_counted=True), priority, None)),
    )


def with_priorities(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which streams of low priority have all places when others of high
    priority come, which must not wait for them; one of low priority that comes amid those is not starved."""
    start_s, is_flood = 2.0, rng.random() < 0.5
    num_low, num_high = (1, 60) if is_flood else (12, 6)
    low = [
        plain_request(rng, f"low{number}", "low", start_s + is_flood, 5 if is_flood else 110, 1)
        for number in range(num_low)
    ]
    # of one client: turns among clients would make room
    high = [
        plain_request(rng, f"high{number}", "low", start_s + (not is_flood), 20 if is_flood else 5, 1)
        for number in range(num_high)
    ]
    within_s = 3.0 * SOON_S if is_flood else SOON_S
    return replace(
        staged(scenario, max_batch_size=4),
        pools=ONE_EACH,
        requests=(
            *(_prioritised(plan, 7, within_s if is_flood else None) for plan in low),
            *(_prioritised(plan, -7, None if is_flood else within_s) for plan in high),
        ),
    )


def _prioritised(plan: PlannedRequest, priority: int, within_s: float | None) -> PlannedRequest:
    request = msgspec.structs.replace(plan.request, priority=priority)
    return replace(plan, request=request, first_token_within_s=within_s)


def with_large_request(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which a client's large request has to wait for a stream to end,
    and its small ones must not."""
    start_s = 2.0
    return replace(
        staged(scenario, num_blocks=40),
        pools=ONE_EACH,
        prefill_on_decode=False,
        requests=(
            plain_request(rng, "stream", "c", start_s, 60, 1, num_tokens=60),
            plain_request(rng, "large", "c", start_s + 0.3, 5, 1, num_tokens=100),
            *(
                replace(
                    plain_request(rng, f"small{number}", "c", start_s + rng.uniform(0.4, 0.9), 2, 1),
                    first_token_within_s=SOON_S,
                )
                for number in range(3)
            ),
        ),
    )


def with_hidden_room(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which three of four decode workers have no blocks left, and the
    fourth has, though many small streams make it the most loaded."""
    start_s = 2.0

    def requests(
        name: str, number: int, at_s: float, num_tokens: int, max_tokens: int
    ) -> list[PlannedRequest]:
        return [
            plain_request(rng, f"{name}{one}", f"{name}{one}", at_s, max_tokens, 1, num_tokens=num_tokens)
            for one in range(number)
        ]

    small = requests("small", 13, start_s + 0.3, 20, 100)
    return replace(
        staged(scenario, num_blocks=34, step_s=0.1),
        pools={Role.PREFILL: 1, Role.DECODE: 4},
        prefill_on_decode=False,
        requests=(
            *requests("large", 4, start_s, 110, 18),
            *(replace(plan, first_token_within_s=SOON_S) for plan in small),
        ),
        unequal={"worker-3": Inequality(num_blocks=8.0)},
    )
