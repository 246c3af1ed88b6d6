"""The scenario of one seed: a cluster, its clients, and its faults."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..core.messages import Role
from ..core.request import Request
from ..worker.router_session import ROUTER_LOST_TIMEOUT_S
from .faults import OF_THE_ROUTER, Accident, FaultRates
from .rank_accidents import PlannedRankAccident
from .simulated_hosts import PlannedHost
from .simulated_planner import PlannedPlanner
from .simulated_worker import WorkerShape

MAX_MODEL_LEN = 128
CALM_S = 6.0  # faults end here
CONTEST_TOKENS = 2000.0  # that each client has had, divided by its weight, when shares are compared
MAX_GRAY_FAILURES = 12  # dispatches that a gray worker, or a pair, may cost before it is left alone


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
    body_s: float = 0.0  # of the head's loop, to read what it sends
    is_counted: bool = False  # its wait, in turns of others


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


class GrayKind(enum.Enum):
    """The fault of a gray worker."""

    STORE = "it fails to read or write a block"
    CORRUPT = "bytes that it sends or receives are altered"


@dataclass(frozen=True)
class Gray:
    """A worker that fails at once, and how often."""

    worker_id: str
    kind: GrayKind
    rate: float = 1.0


@dataclass(frozen=True)
class Severed:
    """A prefill and a decode worker, on whatever host, that can never connect."""

    prefill: str
    decode: str
    is_silent: bool  # attempts time out, instead of being refused


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
    rank_accidents: tuple[PlannedRankAccident, ...] = ()
    gray: Gray | None = None
    severed: Severed | None = None
    unequal: Mapping[str, Inequality] = field(
        default_factory=dict
    )  # by worker; others are as their pool's shape
    deadly: Deadly | None = None
    heard_s: float = 0.005  # until the end of a process is noticed, beside its connection's
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
        ends = [accident.at_s + accident.duration_s for accident in self.accidents]
        ends += [accident.at_s + accident.duration_s for accident in self.rank_accidents]
        return max([CALM_S, *ends])

    @property
    def longest_accident_s(self) -> float:
        return max((accident.duration_s for accident in self.accidents), default=0.0)

    @property
    def has_large_bodies(self) -> bool:
        """Whether requests take the head's loop for long."""
        return any(plan.body_s for plan in self.requests)

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
            and not self.has_large_bodies  # of a dispatch's two commands one may be lost then
            and self.gray is None
            and self.severed is None
            and self.deadly is None
            and self.planner is None
        )
