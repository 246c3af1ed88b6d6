"""Summaries of a cluster that serves a drawn load, for the live planner."""

from dataclasses import astuple, dataclass, field, replace
from random import Random

from msgspec import structs

from pdserve.core.latency import LearntLatency
from pdserve.planner.durations import DecodeSeconds
from pdserve.planner.live import LivePlanner
from pdserve.router.config import RouterConfig
from pdserve.router.planning import (
    Advice,
    Bounds,
    InstanceFacts,
    Objective,
    PoolLimits,
    Ratio,
    SeenRequest,
    Summary,
    Terms,
)

from .replay_support import DURATIONS, LAYOUT

INTERVAL_S = 5.0
DECODE = DecodeSeconds(0.2, 1e-6, 4e-3)
SLOW = replace(DURATIONS, prefill_token_s=4e-3, decode=DECODE, decode_large=DECODE)
LATENCY = LearntLatency(SLOW.priors, astuple(DECODE), 32)
BOUNDS = Bounds(Ratio(1, 1), Ratio(3, 3), 4)


def terms(
    objective: Objective = Objective.GOODPUT, bounds: Bounds = BOUNDS, horizon_s: float = 30.0
) -> Terms:
    limits = PoolLimits(512, 32)
    return Terms(
        objective=objective,
        horizon_s=horizon_s,
        bounds=bounds,
        ttft_slo_s=4.0,
        itl_slo_s=0.8,
        router=RouterConfig(prefill_on_decode_factor=None, itl_slo_s=0.8),
        layout=LAYOUT,
        max_model_len=4096,
        prefill=limits,
        decode=limits,
        can_flip=True,
    )


@dataclass(frozen=True)
class Load:
    """Poisson arrivals of prompts and outputs of about these lengths."""

    rate: float
    num_prompt_tokens: int
    num_output_tokens: int

    def draw(self, rng: Random, from_s: float, until_s: float) -> list[SeenRequest]:
        found = []
        at_s = from_s + rng.expovariate(self.rate)
        while at_s < until_s:
            factor = rng.uniform(0.5, 1.5)
            lengths = round(self.num_prompt_tokens * factor), 0, round(self.num_output_tokens * factor)
            found.append(SeenRequest(at_s, *lengths, "c", True))
            at_s += rng.expovariate(self.rate)
        return found


PROMPTS = Load(3.75, 100, 5)
OUTPUTS = Load(6.0, 3, 25)


@dataclass
class FollowedCluster:
    """Follows the advice at once. Requests end in the summary in which they arrive; as many are good as was
    predicted for the ratio, times `honesty`. It decides after `every` so many summaries."""

    ratio: Ratio
    terms: Terms = field(default_factory=terms)
    seed: int = 0
    honesty: float = 1.0
    every: int = 3
    planner: LivePlanner = field(default_factory=LivePlanner)
    number: int = 0
    advice: list[Advice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)

    def summary(self, load: Load | None, **changes: object) -> Summary:
        """Returns the next interval's summary."""
        self.number += 1
        at_s = self.number * INTERVAL_S
        seen = [] if load is None else self._served(load.draw(self.rng, at_s - INTERVAL_S, at_s))
        roles = [role for role, size in self.ratio.sizes.items() for _ in range(size)]
        values: dict[str, object] = {
            "number": self.number,
            "at_s": at_s,
            "duration_s": INTERVAL_S,
            "num_arrived": len(seen),
            "seen": tuple(seen),
            "open": (),
            "ratio": self.ratio,
            "is_settled": True,
            "instances": tuple(InstanceFacts(role, 1000, 1.0, 1.0) for role in roles),
            "latency": LATENCY,
            "knows_latency": True,
            "start_s": 5.0,
            "terms": self.terms,
        }
        return Summary(**(values | changes))  # type: ignore[arg-type]

    @property
    def changes(self) -> list[Ratio]:
        return [advice.to for advice in self.advice if advice.to is not None]

    def run(self, load: Load | None, num_summaries: int, **changes: object) -> list[Ratio]:
        """Returns the ratios that were advised, in order."""
        changed = []
        for index in range(num_summaries):
            self.planner.observe(self.summary(load, **changes))
            if (index + 1) % self.every:
                continue
            advice = self.planner.decide()
            self.advice.append(advice)
            if advice.to is not None:
                changed.append(advice.to)
                self.ratio = advice.to
        return changed

    def _served(self, requests: list[SeenRequest]) -> list[SeenRequest]:
        candidates = self.advice[-1].candidates if self.advice else ()
        predicted = {one.ratio: one.attainment for one in candidates}
        share = self.honesty * predicted.get(self.ratio, 1.0)
        return [structs.replace(one, is_good=self.rng.random() < share) for one in requests]
