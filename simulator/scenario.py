"""The scenario of one seed: a cluster, its clients, and its faults. All of it is drawn here, before anything
runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from ..core.messages import Role
from ..core.request import Request, SamplingParams
from ..router.planner_desk import Mode
from ..router.planning import Bounds, Ratio
from ..worker.router_session import ROUTER_LOST_TIMEOUT_S
from .faults import OF_ENGINES, OF_HOSTS, OF_THE_ROUTER, ORDERLY, Accident, FaultRates
from .kv_model import VOCABULARY, expected_tokens
from .simulated_hosts import PlannedHost
from .simulated_planner import PlannedPlanner
from .simulated_worker import WorkerShape

MAX_MODEL_LEN = 128
CALM_S = 6.0  # faults end here
SOON_S = 1.0  # deadline for the first token of a request that others must not delay
ONE_EACH = {Role.PREFILL: 1, Role.DECODE: 1}
SWAP = 1.0, 0.0  # draws of `Accident.SCALE`: all to prefill, then one each
MAX_GRAY_FAILURES = 12  # dispatches that a gray worker may cost before it is left alone


@dataclass(frozen=True)
class PlannedRequest:
    """One client's request, and the client's planned actions on it."""

    at_s: float
    request: Request
    cancel_after_s: float | None = None
    stop_after_tokens: int | None = None  # of choice 0: its stop string is found then
    stop_delay_s: float = 0.0  # until the router receives that
    unread_after_tokens: int | None = None  # of choice 0: the client does not read for a while then
    unread_s: float = 0.0
    first_token_within_s: float | None = None  # promised to this client
    ends_within_s: float | None = None


@dataclass(frozen=True)
class PlannedAccident:
    at_s: float
    kind: Accident
    draw: float  # 0 to 1: selects the target
    duration_s: float


@dataclass(frozen=True)
class Deadly:
    """A request that ends the process of any worker that computes token `index` of its choice 0."""

    request_id: str
    index: int


@dataclass(frozen=True)
class Inequality:
    """How a worker differs from its pool's shape."""

    slowness: float = 1.0  # its steps take so many times as long
    num_blocks: float = 1.0  # it has so many times as many


EQUAL = Inequality()


@dataclass(frozen=True)
class Scenario:
    seed: int
    pools: dict[Role, int]
    shapes: dict[Role, WorkerShape]
    transport: str
    chunk_bytes: int
    ring_slots: int
    lease_s: float
    max_links: int  # that a worker keeps in each direction
    max_queued_requests: int
    max_attempts: int
    prefill_on_decode: bool
    start_s: float  # duration of a worker's start
    hosts: tuple[PlannedHost, ...]
    join_timeout_s: float
    rates: FaultRates
    requests: tuple[PlannedRequest, ...]
    accidents: tuple[PlannedAccident, ...]
    gray_worker: str | None = None  # fails to read or write a block, at once
    gray_rate: float = 1.0  # how often
    unequal: Mapping[str, Inequality] = field(
        default_factory=dict
    )  # by worker; others are as their pool's shape
    deadly: Deadly | None = None
    contest: tuple[str, ...] = ()  # clients that always have something queued, and get shares by weight
    max_running_per_client: int | None = None
    enforces_itl: bool = False
    keeps_streams: bool = False  # none may end for want of attempts
    planner: PlannedPlanner | None = None

    def shape_of(self, role: Role, worker_id: str) -> WorkerShape:
        """Returns the limits of one worker; a slow one takes longer for each step."""
        shape, unequal = self.shapes[role], self.unequal.get(worker_id, EQUAL)
        return replace(
            shape,
            num_blocks=int(shape.num_blocks * unequal.num_blocks),
            step_s=shape.step_s * unequal.slowness,
            token_s=shape.token_s * unequal.slowness,
        )

    @property
    def end_of_faults_s(self) -> float:
        """When faults have ended, those of accidents included."""
        return max([CALM_S, *(accident.at_s + accident.duration_s for accident in self.accidents)])

    @property
    def longest_accident_s(self) -> float:
        return max((accident.duration_s for accident in self.accidents), default=0.0)

    @property
    def has_crashes_alone(self) -> bool:
        """Whether engines crash and nothing else goes wrong."""
        return {accident.kind for accident in self.accidents} == {Accident.CRASH} and (
            self.rates == FaultRates()
        )

    @property
    def is_computed_once(self) -> bool:
        """Whether only the router fails or stands still, not until workers give it up, and every client
        reads: then no token is computed twice."""
        rates = self.rates
        return (
            {accident.kind for accident in self.accidents} <= set(OF_THE_ROUTER)
            and self.longest_accident_s < ROUTER_LOST_TIMEOUT_S
            and not rates.lose + rates.duplicate + rates.overtake + rates.corrupt + rates.fail_store
            and all(plan.unread_after_tokens is None for plan in self.requests)
            and self.gray_worker is None
            and self.deadly is None
            and self.planner is None
        )


def draw_scenario(seed: int, num_requests: int | None = None, *, with_faults: bool = True) -> Scenario:
    """Returns the scenario of `seed`, which is the same in every process."""
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
    requests = _draw_requests(rng, shapes, num_requests or rng.randint(5, 30))
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
    if num_requests is None and rng.random() < 0.03:
        return _with_greedy_client(rng, scenario)
    still = Random(f"standstill of {seed}")
    if with_faults and num_requests is None and still.random() < 0.03:
        return _with_standing_router(still, scenario)
    special = Random(f"special of {seed}")
    if num_requests is None and special.random() < 0.04:
        drawn = special.choice((_with_gray_worker, _with_large_request))
        if with_faults or drawn is _with_large_request:
            return drawn(special, scenario)
    elif num_requests is None and special.random() < 0.06:
        drawn = special.choice((_with_deadly_request, _with_contest, _with_priorities))
        if with_faults or drawn is not _with_deadly_request:
            return drawn(special, scenario)
    gray = Random(f"gray of {seed}")
    if with_faults and num_requests is None and gray.random() < 0.03:
        return gray.choice((_with_slow_worker, _with_slow_worker, _with_swap))(gray, scenario)
    if num_requests is None and gray.random() < 0.03:
        pools = {Role.PREFILL: gray.randint(1, 8), Role.DECODE: gray.randint(1, 8)}
        scenario = replace(scenario, pools=pools, hosts=(PlannedHost(64, 0.0),))
    if num_requests is None and gray.random() < 0.01:
        return _with_long_start(gray, scenario)
    rare = Random(f"rare of {seed}")
    if num_requests is None and rare.random() < 0.04:
        drawn = rare.choice((_with_lost_workers, _with_crash, _with_hidden_room))
        if with_faults or drawn is _with_hidden_room:
            return drawn(rare, scenario)
    return replace(
        scenario,
        unequal=_draw_unequal(Random(f"unequal workers of {seed}"), sum(pools.values())),
        max_running_per_client=special.choice((None, None, 1, 3)),
        enforces_itl=Random(f"objective of {seed}").random() < 0.1,
        planner=_draw_planner(Random(f"planner of {seed}")) if Accident.SCALE in kinds else None,
    )


def _draw_planner(rng: Random) -> PlannedPlanner | None:
    if rng.random() >= 0.1:
        return None
    most = Ratio(rng.randint(2, 3), rng.randint(2, 3))
    bounds = Bounds(Ratio(1, 1), most, rng.randint(3, 6))
    return PlannedPlanner(rng.choice((Mode.AUTO, Mode.AUTO, Mode.ADVISE)), bounds)


def _with_greedy_client(rng: Random, scenario: Scenario) -> Scenario:
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
    greedy = [_plain_request(rng, f"greedy{number}", "greedy", 0.0, 110, n) for number in range(num_greedy)]
    modest = [
        _plain_request(rng, f"modest{number}", f"c{number}", rng.uniform(2.5, 4.0), 5, 1)
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


def _with_gray_worker(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which one of three workers of a pool fails fast."""
    return replace(
        _staged(scenario),
        pools={Role.PREFILL: 3, Role.DECODE: 3},
        max_attempts=5,
        prefill_on_decode=False,
        requests=tuple(
            _plain_request(rng, f"r{number}", f"c{number % 4}", 2.0 + rng.uniform(0.0, 4.0), 5, 1)
            for number in range(60)
        ),
        gray_worker=f"worker-{rng.randrange(6)}",
        gray_rate=rng.choice((1.0, 1.0, 0.3)),
    )


def _with_long_start(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which workers load for longer than they may without progress."""
    return replace(
        _staged(scenario),
        pools=ONE_EACH,
        start_s=rng.uniform(7.0, 12.0),
        requests=tuple(
            _plain_request(rng, f"r{number}", f"c{number % 4}", rng.uniform(0.0, CALM_S), 5, 1)
            for number in range(8)
        ),
    )


def _with_slow_worker(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which one of three workers of a pool takes ten or twenty
    times as long for each step. Once that is known, no request has to wait for it."""
    start_s, known_s = 2.0, 4.0
    plans = [
        _plain_request(
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
        _staged(scenario),
        pools={Role.PREFILL: 3, Role.DECODE: 3},
        prefill_on_decode=False,
        requests=tuple(replace(plan, ends_within_s=3.0 if plan.at_s >= known_s else None) for plan in plans),
        unequal={f"worker-{rng.randrange(6)}": Inequality(slowness=rng.choice((10.0, 20.0)))},
    )


def _with_swap(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which the decode worker, `worker-0`, and the prefill worker
    swap roles amid prompts that each hardly holds beside another."""
    at_s = 3.0
    staged = _staged(scenario, num_blocks=32)
    return replace(
        staged,
        pools=ONE_EACH,
        shapes={
            role: replace(shape, max_batch_tokens=12, runs_ahead=False)
            for role, shape in staged.shapes.items()
        },
        accidents=(
            PlannedAccident(at_s + 0.01, Accident.SCALE, SWAP[0], 0.0),
            PlannedAccident(at_s + rng.uniform(0.012, 0.03), Accident.SCALE, SWAP[1], 0.0),
        ),
        lease_s=30.0,
        prefill_on_decode=False,
        requests=tuple(
            _plain_request(
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


def _with_lost_workers(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario in which long streams lose their worker more often than a request may fail in a row,
    and get on in between."""
    return replace(
        _staged(scenario, step_s=0.04),
        pools={Role.PREFILL: 1, Role.DECODE: 2},
        max_attempts=3,
        rates=FaultRates(max_half_open_s=0.0),  # nothing is dispatched to a worker that is gone
        accidents=tuple(
            PlannedAccident(1.2 + number, Accident.CUT, rng.random(), 0.0) for number in range(7)
        ),
        requests=tuple(
            _plain_request(rng, f"r{number}", f"c{number}", rng.uniform(0.5, 1.0), 110, 1)
            for number in range(6)
        ),
        keeps_streams=True,
    )


def _with_crash(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which workers' engines crash amid streams."""
    return replace(
        _staged(scenario),
        pools={Role.PREFILL: 2, Role.DECODE: 3},
        max_attempts=50,
        accidents=tuple(
            PlannedAccident(rng.uniform(1.5, 4.0), Accident.CRASH, rng.random(), 0.0)
            for _ in range(rng.choice((1, 2)))
        ),
        requests=tuple(
            _plain_request(rng, f"r{number}", f"c{number % 4}", rng.uniform(1.0, 4.0), rng.choice((5, 40)), 1)
            for number in range(20)
        ),
    )


def _with_hidden_room(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which three of four decode workers have no blocks left, and the
    fourth has, though many small streams make it the most loaded."""
    start_s = 2.0

    def requests(
        name: str, number: int, at_s: float, num_tokens: int, max_tokens: int
    ) -> list[PlannedRequest]:
        return [
            _plain_request(rng, f"{name}{one}", f"{name}{one}", at_s, max_tokens, 1, num_tokens=num_tokens)
            for one in range(number)
        ]

    small = requests("small", 13, start_s + 0.3, 20, 100)
    return replace(
        _staged(scenario, num_blocks=34, step_s=0.1),
        pools={Role.PREFILL: 1, Role.DECODE: 4},
        prefill_on_decode=False,
        requests=(
            *requests("large", 4, start_s, 110, 18),
            *(replace(plan, first_token_within_s=SOON_S) for plan in small),
        ),
        unequal={"worker-3": Inequality(num_blocks=8.0)},
    )


def _with_deadly_request(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without other faults in which a request ends the process of each worker that
    computes it, and its client sends it again and again, beside the streams of others."""
    start_s = 2.0
    n = rng.choice((1, 1, 2))
    deadly = _plain_request(rng, "deadly", "key:deadly", 0.0, 30, n)
    return replace(
        _staged(scenario),
        start_s=0.3,
        max_attempts=50,
        requests=(
            *(
                _plain_request(
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
    )


def _with_contest(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which two clients have more queued than one worker can serve: one
    with short prompts, long outputs and two choices, one with long prompts and short outputs."""
    long = [_plain_request(rng, f"long{number}", "long", 2.0, 60, 2) for number in range(40)]
    short = [_plain_request(rng, f"short{number}", "short", 2.0, 5, 1, num_tokens=60) for number in range(80)]
    weight = rng.choice((1.0, 1.0, 2.0))
    return replace(
        _staged(scenario, max_batch_size=4),
        pools=ONE_EACH,
        prefill_on_decode=False,
        requests=tuple(
            replace(
                plan,
                request=msgspec.structs.replace(
                    plan.request, weight=weight if plan.request.client == "long" else 1.0
                ),
            )
            for plan in (*long, *short)
        ),
        contest=("long", "short"),
    )


def _with_priorities(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which streams of low priority have all places when others of high
    priority come, which must not wait for them; one of low priority that comes amid those is not starved."""
    start_s, is_flood = 2.0, rng.random() < 0.5
    num_low, num_high = (1, 60) if is_flood else (12, 6)
    low = [
        _plain_request(rng, f"low{number}", "low", start_s + is_flood, 5 if is_flood else 110, 1)
        for number in range(num_low)
    ]
    # of one client: turns among clients would make room
    high = [
        _plain_request(rng, f"high{number}", "low", start_s + (not is_flood), 20 if is_flood else 5, 1)
        for number in range(num_high)
    ]
    within_s = 3.0 * SOON_S if is_flood else SOON_S
    return replace(
        _staged(scenario, max_batch_size=4),
        pools=ONE_EACH,
        requests=(
            *(_prioritised(plan, 7, within_s if is_flood else None) for plan in low),
            *(_prioritised(plan, -7, None if is_flood else within_s) for plan in high),
        ),
    )


def _prioritised(plan: PlannedRequest, priority: int, within_s: float | None) -> PlannedRequest:
    request = msgspec.structs.replace(plan.request, priority=priority)
    return replace(plan, request=request, first_token_within_s=within_s)


def _with_large_request(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario without faults in which a client's large request has to wait for a stream to end,
    and its small ones must not."""
    start_s = 2.0
    return replace(
        _staged(scenario, num_blocks=40),
        pools=ONE_EACH,
        prefill_on_decode=False,
        requests=(
            _plain_request(rng, "stream", "c", start_s, 60, 1, num_tokens=60),
            _plain_request(rng, "large", "c", start_s + 0.3, 5, 1, num_tokens=100),
            *(
                replace(
                    _plain_request(rng, f"small{number}", "c", start_s + rng.uniform(0.4, 0.9), 2, 1),
                    first_token_within_s=SOON_S,
                )
                for number in range(3)
            ),
        ),
    )


def _with_standing_router(rng: Random, scenario: Scenario) -> Scenario:
    """Returns a scenario in which the router stands still amid streams, mostly for so long that the workers
    hang up."""
    is_starting = rng.random() < 0.2  # workers load when it stops
    begin_s = 1.5 + (0.5 if is_starting else rng.uniform(0.5, 2.0))
    durations_s = rng.choice(((1.0,), (11.0,), (12.0, 11.0), (20.0,), (30.0,), (60.0,)))
    staged = _staged(scenario)
    return replace(
        staged,
        shapes={
            role: replace(shape, step_s=rng.choice((0.03, 0.12))) for role, shape in staged.shapes.items()
        },
        start_s=1.0 if is_starting else 0.1,
        accidents=tuple(
            PlannedAccident(begin_s + 13.0 * number, Accident.ROUTER_FREEZE, 0.0, duration_s)
            for number, duration_s in enumerate(durations_s)
        ),
        requests=tuple(
            replace(
                _plain_request(
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


def _staged(
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


def _plain_request(
    rng: Random, request_id: str, client: str, at_s: float, max_tokens: int, n: int, *, num_tokens: int = 9
) -> PlannedRequest:
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(rng.randrange(VOCABULARY) for _ in range(num_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, n=n, seed=rng.getrandbits(32)),
        client=client,
    )
    return PlannedRequest(at_s, request)


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
