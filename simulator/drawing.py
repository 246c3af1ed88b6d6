"""Draws the scenario of a seed, before anything runs."""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import msgspec

from ..core.messages import Role
from ..core.request import Request, SamplingParams
from ..router.planner_desk import Mode
from ..router.planning import Bounds, Ratio
from .drawn_ranks import with_ranks
from .faults import OF_ENGINES, OF_HOSTS, OF_THE_ROUTER, ORDERLY, Accident, FaultRates
from .kv_model import VOCABULARY, expected_tokens
from .scenario import (
    CALM_S,
    MAX_MODEL_LEN,
    Gray,
    GrayKind,
    Inequality,
    PlannedAccident,
    PlannedRequest,
    Scenario,
)
from .simulated_hosts import PlannedHost
from .simulated_planner import PlannedPlanner
from .simulated_worker import WorkerShape
from .staged_faults import (
    with_blind_router,
    with_crash,
    with_deadly_request,
    with_gray_worker,
    with_large_bodies,
    with_long_start,
    with_lost_workers,
    with_severed_pair,
    with_slow_worker,
    with_standing_router,
    with_swap,
)
from .staged_loads import (
    with_contest,
    with_crowd,
    with_greedy_client,
    with_hidden_room,
    with_large_request,
    with_priorities,
)


def draw_scenario(seed: int, *, with_faults: bool = True, pool_size: int | None = None) -> Scenario:
    """Returns the scenario of `seed`, which is the same in every process. `pool_size`: that of each pool,
    which else is drawn."""
    scenario = _draw_common(seed, with_faults)
    scenario = (
        _draw_special(seed, scenario, with_faults) if pool_size is None else _widened(scenario, pool_size)
    )
    return with_ranks(Random(f"ranks of {seed}"), scenario)


def _draw_common(seed: int, with_faults: bool) -> Scenario:
    """Draws faults of all kinds at once, mostly."""
    rng = Random(seed)
    pools = {Role.PREFILL: rng.choice((1, 1, 2, 3)), Role.DECODE: rng.choice((1, 1, 2, 3))}
    is_crowded = rng.random() < 0.15  # no faults, but memory is nearly full, steps are slow and leases short
    shapes = _draw_shapes(rng, is_crowded)
    rates = _draw_rates(rng)
    hosts = _draw_hosts(Random(f"hosts of {seed}"), sum(pools.values()))
    kinds: list[Accident] = [
        kind for kind in Accident if kind not in OF_ENGINES and (len(hosts) > 1 or kind not in OF_HOSTS)
    ]
    if not with_faults or is_crowded or rng.random() < 0.1:
        rates = FaultRates()
    elif rng.random() < 0.1:
        rates, kinds = FaultRates(accidents_per_s=1.0), [kind for kind in kinds if kind in ORDERLY]
    elif rng.random() < 0.1:
        rates, kinds = FaultRates(accidents_per_s=0.5), list(OF_THE_ROUTER)
    requests = _draw_requests(rng, shapes, rng.randint(5, 30))
    if kinds == list(OF_THE_ROUTER):  # an unread stream is recomputed from its last position
        requests = tuple(replace(plan, unread_after_tokens=None) for plan in requests)
    num_accidents = int(rates.accidents_per_s * CALM_S)
    scenario = Scenario(
        seed=seed,
        pools=pools,
        shapes=shapes,
        transport=rng.choice(("shm", "gloo")),
        chunk_bytes=rng.choice((64, 128, 512)),
        ring_slots=rng.choice((1, 2, 4)),
        lease_s=1.0 if is_crowded else rng.choice((1.0, 30.0)),
        max_links=Random(f"links of {seed}").choice((64, 64, 1)),
        max_queued_requests=rng.choice((4, 16, 1024)),
        max_attempts=rng.choice((50, 50, 50, 2)),
        prefill_on_decode=rng.random() < 0.5,
        start_s=rng.uniform(0.05, 1.0),
        hosts=hosts,
        join_timeout_s=2.0 if seed % 3 else 30.0,
        rates=rates,
        requests=requests,
        accidents=tuple(
            PlannedAccident(
                rng.uniform(0.3, CALM_S), rng.choice(kinds), rng.random(), rng.choice((0.05, 0.5, 2.0, 5.0))
            )
            for _ in range(num_accidents)
        ),
    )
    hang = Random(f"hang of {seed}")
    if Accident.KILL in kinds and rates.accidents_per_s and hang.random() < 0.2:
        at_s, draw, kind = hang.uniform(1.0, 3.0), hang.random(), hang.choice(OF_ENGINES)
        accident = PlannedAccident(at_s, kind, draw, 0.0)
        scenario = replace(scenario, accidents=(*scenario.accidents, accident))
    return scenario


def _draw_special(seed: int, scenario: Scenario, with_faults: bool) -> Scenario:
    """Draws a staged scenario in place of this one, or what remains to be drawn of it."""
    greedy = Random(f"greedy client of {seed}")
    if greedy.random() < 0.03:
        return with_greedy_client(greedy, scenario)
    still = Random(f"standstill of {seed}")
    if with_faults and still.random() < 0.03:
        return with_standing_router(still, scenario)
    special = Random(f"special of {seed}")
    if special.random() < 0.04:
        drawn = special.choice((with_gray_worker, with_large_request))
        if with_faults or drawn is with_large_request:
            return drawn(special, scenario)
    elif special.random() < 0.05:
        drawn = special.choice((with_deadly_request, with_priorities))
        if with_faults or drawn is not with_deadly_request:
            return drawn(special, scenario)
    gray = Random(f"gray of {seed}")
    if with_faults and gray.random() < 0.03:
        return gray.choice((with_slow_worker, with_slow_worker, with_swap))(gray, scenario)
    if gray.random() < 0.03:
        pools = {Role.PREFILL: gray.randint(1, 8), Role.DECODE: gray.randint(1, 8)}
        scenario = replace(scenario, pools=pools, hosts=(PlannedHost(64, 0.0),))
    if gray.random() < 0.01:
        return with_long_start(gray, scenario)
    rare = Random(f"rare of {seed}")
    if rare.random() < 0.04:
        drawn = rare.choice((with_lost_workers, with_crash, with_hidden_room))
        if with_faults or drawn is with_hidden_room:
            return drawn(rare, scenario)
    fair = Random(f"fairness of {seed}")
    if fair.random() < 0.015:
        return fair.choice((with_contest, with_crowd))(fair, scenario)
    blocked = Random(f"blocked of {seed}")
    if with_faults and blocked.random() < 0.02:
        return blocked.choice((with_severed_pair, with_large_bodies))(blocked, scenario)
    blind = Random(f"blind router of {seed}")
    if with_faults and blind.random() < 0.01:
        return with_blind_router(blind, scenario)
    return replace(
        scenario,
        unequal=_draw_unequal(Random(f"unequal workers of {seed}"), sum(scenario.pools.values())),
        max_running_per_client=special.choice((None, None, 1, 3)),
        enforces_itl=Random(f"objective of {seed}").random() < 0.1,
        planner=_draw_planner(Random(f"planner of {seed}"), scenario),
    )


def _draw_planner(rng: Random, scenario: Scenario) -> PlannedPlanner | None:
    kinds = {accident.kind for accident in scenario.accidents}
    if rng.random() >= 0.1 or (kinds and kinds <= set(OF_THE_ROUTER)):  # then each token is computed once
        return None
    most = Ratio(rng.randint(2, 3), rng.randint(2, 3))
    bounds = Bounds(Ratio(1, 1), most, rng.randint(3, 6))
    return PlannedPlanner(rng.choice((Mode.AUTO, Mode.AUTO, Mode.ADVISE)), bounds)


def _widened(scenario: Scenario, pool_size: int) -> Scenario:
    """Returns the scenario with pools of this size, unequal workers and as many more requests, on one host or
    several. Some have one gray worker and no other fault."""
    rng = Random(f"{pool_size} of {scenario.seed}")
    hosts: tuple[PlannedHost, ...] = (PlannedHost(2 * pool_size, 0.0),)
    if rng.random() < 0.5:
        others = (PlannedHost(pool_size, rng.uniform(0.0, 2.0)) for _ in range(rng.randint(1, 3)))
        hosts = (PlannedHost(pool_size, 0.0), *others)
    requests = _draw_requests(rng, scenario.shapes, rng.randint(pool_size, 4 * pool_size))
    if scenario.is_computed_once:  # an unread stream is recomputed from its last position
        requests = tuple(replace(plan, unread_after_tokens=None) for plan in requests)
    scenario = replace(
        scenario,
        pools=dict.fromkeys(scenario.pools, pool_size),
        hosts=hosts,
        requests=requests,
        unequal=_draw_unequal(rng, 2 * pool_size),
        max_running_per_client=rng.choice((None, None, 1, 3)),
    )
    if rng.random() > 0.1:
        return scenario
    gray = Gray(f"worker-{rng.randrange(2 * pool_size)}", rng.choice(list(GrayKind)))
    return replace(scenario, gray=gray, rates=FaultRates(), accidents=(), max_attempts=5)


def _draw_hosts(rng: Random, num_workers: int) -> tuple[PlannedHost, ...]:
    """Draws one host with more cores than are ever needed, or several with just enough, most of which join
    late."""
    if rng.random() < 0.5:
        return (PlannedHost(64, 0.0),)
    hosts = [PlannedHost(rng.choice((1, 1, 2, 3)), 0.0)]
    while sum(host.num_cores for host in hosts) < num_workers or len(hosts) < 2:
        hosts.append(PlannedHost(rng.choice((1, 2, 3)), rng.choice((0.0, rng.uniform(0.0, 4.0)))))
    # memory is as scarce, on some hosts scarcer
    return tuple(
        replace(host, num_bytes=host.num_cores, num_cores=host.num_cores + (rng.random() < 0.3))
        for host in hosts
    )


def _draw_unequal(rng: Random, num_workers: int) -> Mapping[str, Inequality]:
    """Draws how each worker differs from the others of its pool: mostly not at all."""
    if rng.random() < 0.6:
        return {}
    return {
        f"worker-{number}": Inequality(rng.choice((1.0, 1.0, 2.0, 5.0)), rng.choice((1.0, 1.0, 2.0)))
        for number in range(num_workers)
    }


def _draw_shapes(rng: Random, is_crowded: bool) -> dict[Role, WorkerShape]:
    block_size = rng.choice((4, 4, 8))
    step_s = 0.03 if is_crowded else rng.choice((0.002, 0.002, 0.03))
    shapes = {}
    for role in (Role.PREFILL, Role.DECODE):
        block_size = rng.choice((block_size, block_size, 4, 8))
        longest = -(-MAX_MODEL_LEN // block_size)
        shapes[role] = WorkerShape(
            num_blocks=longest if is_crowded else rng.choice((longest, 2 * longest, 10 * longest)),
            block_size=block_size,
            max_model_len=MAX_MODEL_LEN,
            max_batch_tokens=rng.choice((8, 32, 256)),
            max_batch_size=16 if is_crowded else rng.choice((2, 4, 16)),
            step_s=step_s,
            runs_ahead=rng.random() < 0.4,
        )
    return shapes


def _draw_rates(rng: Random) -> FaultRates:
    def sometimes(rate: float) -> float:
        return rate if rng.random() < 0.3 else 0.0

    return FaultRates(
        lose=sometimes(0.005),
        duplicate=sometimes(0.01),
        overtake=sometimes(0.01),
        corrupt=sometimes(rng.choice((0.02, 0.2))),
        fail_store=sometimes(rng.choice((0.01, 0.1))),
        accidents_per_s=rng.choice((0.0, 0.3, 1.0, 2.0)),
        latency_s=rng.choice((0.0001, 0.0005, 0.005)),
    )


def _draw_requests(
    rng: Random, shapes: dict[Role, WorkerShape], num_requests: int
) -> tuple[PlannedRequest, ...]:
    stems = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    burst_s = rng.choice((0.1, 2.0, CALM_S))
    max_n = min(3, *(shape.max_batch_size for shape in shapes.values()))
    return tuple(_draw_request(rng, number, stems, burst_s, max_n) for number in range(num_requests))


def _draw_request(
    rng: Random, number: int, stems: list[list[int]], burst_s: float, max_n: int
) -> PlannedRequest:
    stem = rng.choice(stems)[: rng.choice((0, 7, 16, 40, 60))]
    # 0: identical to others' prompt
    num_own = rng.choice((0, 1, 2, 9, 20)) if stem else rng.choice((1, 2, 9, 20))
    prompt = stem + [rng.randrange(VOCABULARY) for _ in range(num_own)]
    max_tokens = rng.choice((1, 2, 5, 20, 40))
    salt = rng.choice(("", "", "salt"))
    sampling = SamplingParams(max_tokens=max_tokens, n=rng.choice((1, 1, 1, max_n)), seed=rng.getrandbits(32))
    if sampling.seed % 5 == 0:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=0)
    if sampling.seed % 7 == 0:
        sampling = msgspec.structs.replace(sampling, grammar="any")
    eos: tuple[int, ...] = ()
    if rng.random() < 0.3:
        eos = (rng.choice(expected_tokens(prompt, sampling.seed, 0, max_tokens, salt=salt)),)
    at_s = rng.uniform(0.0, burst_s)
    request = Request(
        request_id=f"r{number}" if rng.random() < 0.9 else f"again{rng.randrange(3)}",
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        eos_token_ids=eos,
        cache_salt=salt,
        deadline_s=at_s + rng.uniform(0.01, 3.0) if rng.random() < 0.15 else None,
        client=f"c{number % rng.choice((1, 2, 5))}",
        priority=(0, 0, 0, -1, 5)[sampling.seed // 35 % 5],
    )
    return PlannedRequest(
        at_s=at_s,
        request=request,
        cancel_after_s=rng.uniform(0.0, 1.0) * rng.random() if rng.random() < 0.15 else None,
        stop_after_tokens=rng.randint(1, max_tokens) if rng.random() < 0.1 else None,
        stop_delay_s=rng.choice((0.0, 0.01, 0.5)),
        unread_after_tokens=rng.randint(1, max_tokens) if rng.random() < 0.15 else None,
        unread_s=rng.choice((0.0, 0.01, 0.1, 1.0)),
    )
