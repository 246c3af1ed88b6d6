"""Scenarios in which one thing goes wrong on a sound cluster, so that its effect can be bounded."""

from dataclasses import replace
from random import Random

import msgspec

from ..core.messages import Role
from .faults import Accident, FaultRates
from .scenario import (
    CALM_S,
    Deadly,
    Gray,
    GrayKind,
    Inequality,
    PlannedAccident,
    PlannedRequest,
    Scenario,
    Severed,
)
from .simulated_hosts import PlannedHost
from .staging import ONE_EACH, plain_request, staged

SWAP = 1.0, 0.0  # draws of `Accident.SCALE`: all to prefill, then one each


def with_gray_worker(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which one of three workers of a pool fails fast."""
    worker_id, rate = f"worker-{rng.randrange(6)}", rng.choice((1.0, 1.0, 0.3))
    return replace(_pools_of_three(rng, scenario), gray=Gray(worker_id, rng.choice(list(GrayKind)), rate))


def with_severed_pair(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which a prefill and a decode worker can never connect."""
    prefill, decode = (f"worker-{3 * is_prefill + rng.randrange(3)}" for is_prefill in (True, False))
    scenario = _pools_of_three(rng, scenario)
    if rng.random() < 0.3:
        scenario = replace(scenario, hosts=(PlannedHost(3, 0.0), PlannedHost(3, 0.0)))
    more = tuple(
        plain_request(rng, f"later{number}", f"c{number % 4}", rng.uniform(6.0, 12.0), 5, 1)
        for number in range(180)
    )
    return replace(
        scenario,
        requests=(*scenario.requests, *more),
        severed=Severed(prefill, decode, is_silent=rng.random() < 0.5),
    )


def _pools_of_three(rng: Random, scenario: Scenario) -> Scenario:
    return replace(
        staged(scenario),
        pools={Role.PREFILL: 3, Role.DECODE: 3},
        max_attempts=5,
        prefill_on_decode=False,
        requests=tuple(
            plain_request(rng, f"r{number}", f"c{number % 4}", 2.0 + rng.uniform(0.0, 4.0), 5, 1)
            for number in range(60)
        ),
    )


def with_long_start(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which workers load for longer than they may without progress."""
    return replace(
        staged(scenario),
        pools=ONE_EACH,
        start_s=rng.uniform(7.0, 12.0),
        requests=tuple(
            plain_request(rng, f"r{number}", f"c{number % 4}", rng.uniform(0.0, CALM_S), 5, 1)
            for number in range(8)
        ),
    )


def with_slow_worker(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which one of three workers of a pool takes ten or twenty
    times as long for each step. Once that is known, no request has to wait for it."""
    start_s, known_s = 2.0, 4.0
    plans = [
        plain_request(
            rng,
            f"r{number}",
            f"c{number % 4}",
            start_s + rng.uniform(0.0, 4.0),
            20,
            1,
            num_tokens=rng.choice((9, 60)),
        )
        for number in range(50)
    ]
    return replace(
        staged(scenario),
        pools={Role.PREFILL: 3, Role.DECODE: 3},
        prefill_on_decode=False,
        requests=tuple(replace(plan, ends_within_s=3.0 if plan.at_s >= known_s else None) for plan in plans),
        unequal={f"worker-{rng.randrange(6)}": Inequality(slowness=rng.choice((10.0, 20.0)))},
    )


def with_swap(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which the decode worker, `worker-0`, and the prefill worker
    swap roles amid prompts that each hardly holds beside another."""
    at_s = 3.0
    base = staged(scenario, num_blocks=32)
    return replace(
        base,
        pools=ONE_EACH,
        shapes={
            role: replace(shape, max_batch_tokens=12, runs_ahead=False) for role, shape in base.shapes.items()
        },
        accidents=(
            PlannedAccident(at_s + 0.01, Accident.SCALE, SWAP[0], 0.0),
            PlannedAccident(at_s + rng.uniform(0.012, 0.03), Accident.SCALE, SWAP[1], 0.0),
        ),
        lease_s=30.0,
        prefill_on_decode=False,
        requests=tuple(
            plain_request(
                rng, f"r{number}", f"c{number}", at_s + after_s, max_tokens, 1, num_tokens=num_tokens
            )
            for number, (after_s, num_tokens, max_tokens) in enumerate(
                (
                    (0.0, 20, 3),
                    (0.001, 100, 2),
                    (0.035 + rng.uniform(0.0, 0.01), 36, 2),
                    (0.05, rng.choice((24, 36)), 2),
                )
            )
        ),
        unequal={"worker-1": Inequality(num_blocks=28 / 32)},
    )


def with_blind_router(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario in which the router dies amid a long prompt, and its successor is asked for one that
    the worker caches, before the worker has reported that: the deadline can be met only with the cache."""
    kill_s, within_s = 9.0, 1.0
    base = staged(scenario)
    long = [
        plain_request(rng, f"r{number}", "c", at_s, 2, 1, num_tokens=110)
        for number, at_s in enumerate((1.5, 3.8, 6.1, kill_s - 0.5))
    ]
    again_s = kill_s + rng.uniform(1.1, 1.3)
    again = msgspec.structs.replace(
        long[2].request, request_id="again", client="another", deadline_s=again_s + within_s
    )
    slow = replace(
        base.shapes[Role.PREFILL], max_batch_tokens=4, step_s=0.002, token_s=0.02, runs_ahead=False
    )
    return replace(
        base,
        pools=ONE_EACH,
        shapes={**base.shapes, Role.PREFILL: slow},
        prefill_on_decode=False,
        accidents=(PlannedAccident(kill_s, Accident.ROUTER_RESTART, 0.0007, rng.uniform(0.05, 0.3)),),
        requests=(*long, PlannedRequest(again_s, again, first_token_within_s=within_s)),
    )


def with_lost_workers(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario in which long streams lose their worker more often than a request may fail in a row,
    and get on in between."""
    return replace(
        staged(scenario, step_s=0.04),
        pools={Role.PREFILL: 1, Role.DECODE: 2},
        max_attempts=3,
        rates=FaultRates(max_half_open_s=0.0),  # nothing is dispatched to a worker that is gone
        accidents=tuple(
            PlannedAccident(1.2 + number, Accident.CUT, rng.random(), 0.0) for number in range(7)
        ),
        requests=tuple(
            plain_request(rng, f"r{number}", f"c{number}", rng.uniform(0.5, 1.0), 110, 1)
            for number in range(6)
        ),
        keeps_streams=True,
    )


def with_crash(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which workers' engines crash amid streams."""
    return replace(
        staged(scenario),
        pools={Role.PREFILL: 2, Role.DECODE: 3},
        max_attempts=50,
        accidents=tuple(
            PlannedAccident(rng.uniform(1.5, 4.0), Accident.CRASH, rng.random(), 0.0)
            for _ in range(rng.choice((1, 2)))
        ),
        requests=tuple(
            plain_request(rng, f"r{number}", f"c{number % 4}", rng.uniform(1.0, 4.0), rng.choice((5, 40)), 1)
            for number in range(20)
        ),
    )


def with_deadly_request(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which a request ends the process of each worker that
    computes it, and its client sends it again and again, beside the streams of others."""
    start_s = 2.0
    n = rng.choice((1, 1, 2))
    deadly = plain_request(rng, "deadly", "key:deadly", 0.0, 30, n)
    return replace(
        staged(scenario),
        start_s=0.3,
        max_attempts=50,
        requests=(
            *(
                plain_request(
                    rng,
                    f"r{number}",
                    f"c{number % 4}",
                    start_s + rng.uniform(0.0, 3.0),
                    rng.choice((5, 40)),
                    1,
                )
                for number in range(20)
            ),
            *(replace(deadly, at_s=start_s + at_s) for at_s in (1.0, 1.1, 3.0)),
        ),
        deadly=Deadly("deadly", rng.choice((0, 0, 1, 2, 9, 20))),
        heard_s=rng.choice((0.005, 0.9, 3.0, 4.5)),
        accidents=_standstill(rng, start_s + 1.0) if rng.random() < 0.4 else (),
    )


def _standstill(rng: Random, at_s: float) -> tuple[PlannedAccident, ...]:
    """Returns a standstill of the router soon after `at_s`."""
    duration_s = rng.choice((0.5, 2.0, 12.0, 20.0))
    return (PlannedAccident(at_s + rng.uniform(0.0, 0.3), Accident.ROUTER_FREEZE, 0.0, duration_s),)


def with_large_bodies(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which bodies arrive in a bunch, each of which takes the
    head's loop for long, all together for so long that workers may hang up."""
    at_s = 3.0
    streams = [
        plain_request(rng, f"r{number}", f"c{number % 4}", rng.uniform(1.0, at_s), rng.choice((5, 40)), 1)
        for number in range(10)
    ]
    bodies = [
        replace(plain_request(rng, f"large{number}", "large", at_s, 5, 1), body_s=rng.uniform(1.0, 2.5))
        for number in range(rng.choice((2, 8)))
    ]
    return replace(
        staged(scenario, step_s=rng.choice((0.03, 0.12))),
        pools={Role.PREFILL: rng.randint(1, 3), Role.DECODE: rng.randint(1, 3)},
        requests=(*streams, *bodies),
    )


def with_standing_router(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario in which the router stands still amid streams, mostly for so long that the workers
    hang up."""
    is_starting = rng.random() < 0.2  # workers load when it stops
    begin_s = 1.5 + (0.5 if is_starting else rng.uniform(0.5, 2.0))
    durations_s = rng.choice(((1.0,), (11.0,), (12.0, 11.0), (20.0,), (30.0,), (60.0,)))
    base = staged(scenario)
    return replace(
        base,
        shapes={role: replace(shape, step_s=rng.choice((0.03, 0.12))) for role, shape in base.shapes.items()},
        start_s=1.0 if is_starting else 0.1,
        accidents=tuple(
            PlannedAccident(begin_s + 13.0 * number, Accident.ROUTER_FREEZE, 0.0, duration_s)
            for number, duration_s in enumerate(durations_s)
        ),
        requests=tuple(
            replace(
                plain_request(
                    rng,
                    f"r{number}",
                    f"c{number % 4}",
                    rng.uniform(1.0, begin_s + 1.0),
                    rng.choice((5, 40, 100)),
                    rng.choice((1, 1, 2)),
                ),
                cancel_after_s=rng.choice((None, None, 1.0, 10.0)),
            )
            for number in range(rng.randint(5, 20))
        ),
    )
