"""The values that pass between the head and its planner, and the planner's account of itself.

head     --Summary-->  planner process     a few seconds of requests, and the workers
head     <--Advice---  planner process     a ratio, or none, with the reasons
operator <--report---  head                the latest advice, and what came of earlier ones"""

import enum
from collections.abc import Iterator

import msgspec

from ..core.latency import LearntLatency
from ..core.messages import KVLayout, Role
from .config import RouterConfig

MAX_CLIENT_CHARS = 64


class Objective(enum.Enum):
    """The quantity that the planner maximises."""

    GOODPUT = "goodput"  # requests per second within both latency objectives
    COST = "cost"  # the same, less what instances cost


class Ratio(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The sizes of both pools."""

    num_prefill: int
    num_decode: int

    def __str__(self) -> str:
        return f"{self.num_prefill}P{self.num_decode}D"

    @property
    def num_instances(self) -> int:
        return self.num_prefill + self.num_decode

    @property
    def sizes(self) -> dict[Role, int]:
        return {Role.PREFILL: self.num_prefill, Role.DECODE: self.num_decode}


class Bounds(msgspec.Struct, frozen=True, array_like=True):
    """The ratios that an operator allows, limits included."""

    least: Ratio
    most: Ratio
    max_instances: int  # of both pools together: those that the hosts hold

    def allow(self, ratio: Ratio) -> bool:
        return (
            self.least.num_prefill <= ratio.num_prefill <= self.most.num_prefill
            and self.least.num_decode <= ratio.num_decode <= self.most.num_decode
            and 0 < ratio.num_instances <= self.max_instances
        )

    def ratios(self) -> Iterator[Ratio]:
        for num_prefill in range(self.least.num_prefill, self.most.num_prefill + 1):
            for num_decode in range(self.least.num_decode, self.most.num_decode + 1):
                if self.allow(ratio := Ratio(num_prefill, num_decode)):
                    yield ratio


class SeenRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that has ended, without its contents."""

    at_s: float  # when it was submitted
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt
    num_output_tokens: int  # of all choices
    client: str  # whose prefixes it shares
    is_good: bool  # complete, and within both latency objectives


class OpenRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that has not ended."""

    at_s: float  # when it was submitted
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt; 0 until it has a place
    num_output_tokens: int  # so far, of all choices
    client: str
    first_token_s: float | None  # when its first token came; None: it waits, or its prompt is computed


class InstanceFacts(msgspec.Struct, frozen=True, array_like=True):
    """A ready worker. The factors are those of `core.worker_speed`."""

    role: Role
    num_blocks: int
    prefill_factor: float
    decode_factor: float


class PoolLimits(msgspec.Struct, frozen=True, array_like=True):
    """The limits that a pool's instances have in common."""

    max_batch_tokens: int
    max_batch_size: int


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the configuration that a plan depends on."""

    objective: Objective
    horizon_s: float
    bounds: Bounds
    ttft_slo_s: float
    itl_slo_s: float
    router: RouterConfig
    layout: KVLayout
    max_model_len: int
    prefill: PoolLimits
    decode: PoolLimits
    can_flip: bool  # a worker of one pool may serve in the other


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Some seconds of a cluster's life. Numbers grow by one, over all heads of a cluster."""

    number: int
    at_s: float  # when it ends, on the head's clock
    duration_s: float
    num_arrived: int  # requests, refused ones included
    seen: tuple[SeenRequest, ...]
    open: tuple[OpenRequest, ...]  # at its end, by arrival
    ratio: Ratio  # as configured
    is_settled: bool  # that many are ready, and no others are left
    instances: tuple[InstanceFacts, ...]
    latency: LearntLatency
    knows_latency: bool  # predictions rest on measurements
    start_s: float  # how long an instance takes to start
    terms: Terms


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio that was replayed. `gain` and `cost` are in good requests of the replay, against keeping the
    present ratio."""

    ratio: Ratio
    goodput: float  # predicted, in requests a second
    attainment: float  # predicted share of requests within both latency objectives
    gain: float  # net: the lower end of its confidence interval, less what distrust takes
    cost: float  # those that would be good at the present ratio alone
    is_screened_out: bool = False  # its replay was given up: it can be no better than the present ratio


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The load that a decision rests on."""

    num_requests: int = 0  # in the replay
    rate: float = 0.0  # arrivals per second
    forecast_rate: float = 0.0  # over the next horizon
    num_waiting: int = 0  # requests without a token
    num_decoding: int = 0
    mean_prompt_tokens: float = 0.0
    mean_cached_tokens: float = 0.0
    mean_output_tokens: float = 0.0
    num_clients: int = 0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction, and what came."""

    from_s: float
    until_s: float
    ratio: Ratio
    predicted: float  # good requests per second
    came: float


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """A decision, made from the summary of that number."""

    number: int
    at_s: float
    made_for: Ratio  # the ratio in force
    to: Ratio | None  # None: no change
    reason: str
    window: Window
    candidates: tuple[Candidate, ...] = ()  # the best first
    trust: float = 1.0  # 1 less the mean error of the latest predictions; gains count for as much
    checks: tuple[Check, ...] = ()  # the latest predictions that could be checked, oldest first
