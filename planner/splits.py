"""The ways to divide devices between prefill and decode, each tried on the same load in virtual time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..core.config import ClusterConfig
from ..core.messages import KVLayout, Role
from ..engine.checkpoint import Checkpoint
from ..engine.gpu import Node
from ..loadgen.slo import Slo
from ..loadgen.statistics import Distribution
from ..router.config import RouterConfig
from .durations import Durations
from .offered_load import OfferedLoad
from .plan import Plan, make_plan, planned_layout
from .priors import Rates, priors
from .virtual_cluster import ServedRequest, VirtualCluster, replaying
from .virtual_instance import InstanceShape


@dataclass(frozen=True)
class Split:
    """A number of instances for each role. Without prefill instances the others serve both phases."""

    num_prefill: int
    num_decode: int
    prefills_on_decode: bool = False  # decode instances compute prompts where that is sooner

    def __str__(self) -> str:
        if self.is_colocated:
            return f"{self.num_decode} colocated"
        return f"{self.num_prefill}P{self.num_decode}D" + " auto" * self.prefills_on_decode

    @property
    def is_colocated(self) -> bool:
        return not self.num_prefill

    @property
    def settings(self) -> dict[str, str]:
        """Returns what it is in cluster.yaml: values by key."""
        values = {
            "pools.prefill.instances": str(self.num_prefill),
            "pools.decode.instances": str(self.num_decode),
        }
        if not self.is_colocated:
            values["routing.prefill_on_decode"] = "auto" if self.prefills_on_decode else "never"
        return values


def all_splits(num_devices: int) -> Iterator[Split]:
    """Yields every division of the devices, colocated first."""
    yield Split(0, num_devices)
    for num_prefill in range(1, num_devices):
        for prefills_on_decode in (False, True):
            yield Split(num_prefill, num_devices - num_prefill, prefills_on_decode)


@dataclass(frozen=True)
class Trial:
    """One split under one load at one rate."""

    split: Split
    rate: float  # offered, in requests a second
    num_requests: int
    num_good: int
    duration_s: float
    num_output_tokens: int
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    gap_ms: Distribution | None  # the largest gap between two tokens of each request
    e2e_ms: Distribution | None
    misses: dict[str, int]  # requests by the objectives that they missed; "failed" is one
    busy_shares: dict[Role, float]  # of the time, by role
    kv_shares: dict[Role, float]  # of the blocks, at most, by role
    num_preemptions: int
    transfer_bytes_per_s: float
    link_share: float  # of the bandwidth into and out of the busier pool

    @property
    def attainment(self) -> float:
        """The share of requests that met every objective."""
        return self.num_good / self.num_requests

    @property
    def goodput(self) -> float:
        """Good requests per second of the offered load."""
        return self.rate * self.attainment


@dataclass(frozen=True)
class Site:
    """The devices, the model and the settings that splits have in common."""

    config: ClusterConfig
    checkpoint: Checkpoint
    nodes: tuple[Node, ...]
    rates: Rates

    def plan(self, split: Split) -> Plan:
        """Returns the memory that each instance has. Raises CapacityError where the model does not fit."""
        pools = self.config.pools
        sized = pools.model_copy(
            update={
                "prefill": pools.prefill.model_copy(update={"instances": split.num_prefill}),
                "decode": pools.decode.model_copy(update={"instances": split.num_decode}),
            }
        )
        return make_plan(self.config.model_copy(update={"pools": sized}), self.checkpoint, self.nodes)

    @cached_property
    def layout(self) -> KVLayout:
        return planned_layout(self.checkpoint.config, self.plan(Split(0, 1)), self.config.kv.wire)

    def shapes(self, split: Split) -> list[InstanceShape]:
        planned = self.plan(split)
        planned.check()
        durations = Durations.of(priors(self.checkpoint.config, planned, self.rates))
        return [
            InstanceShape(
                role=pool.role,
                durations=durations,
                num_blocks=pool.num_blocks,
                max_model_len=planned.max_model_len,
                max_batch_tokens=section.max_batch_tokens,
                max_batch_size=section.max_batch_size,
            )
            for pool, (_, section) in zip(planned.pools, self.config.pools.items(), strict=True)
            for _ in range(pool.instances)
        ]

    def try_out(self, split: Split, load: OfferedLoad, rate: float, slo: Slo, seed: int) -> Trial:
        """Serves the load on the split, to its end. Raises CapacityError where the model does not fit."""
        cluster = self._cluster(split)
        return _trial(split, rate, cluster, cluster.serve(load.arrivals(rate, seed)), slo)

    def attains(
        self, split: Split, load: OfferedLoad, rate: float, slo: Slo, target: float, seed: int
    ) -> bool:
        """Whether a share of `target` of the requests meets every objective. Ends as soon as too many have
        missed one."""
        max_misses = int(load.num_requests * (1 - target))
        num_misses = 0

        def has_failed(request: ServedRequest) -> bool:
            nonlocal num_misses
            num_misses += bool(request.misses(slo))
            return num_misses > max_misses

        self._cluster(split).serve(load.arrivals(rate, seed), has_failed)
        return num_misses <= max_misses

    def _cluster(self, split: Split) -> VirtualCluster:
        config = replaying(RouterConfig.of(self.config), split.prefills_on_decode)
        return VirtualCluster(self.shapes(split), self.layout, config)


def _trial(
    split: Split, rate: float, cluster: VirtualCluster, served: Sequence[ServedRequest], slo: Slo
) -> Trial:
    misses = Counter[str]()
    num_good = 0
    for request in served:
        missed = request.misses(slo)
        misses.update(missed)
        num_good += not missed
    duration_s = max((request.token_s[-1] for request in served if request.token_s), default=0.0)
    by_role: dict[Role, list[float]] = {}
    kv: dict[Role, list[float]] = {}
    for instance in cluster.instances.values():
        by_role.setdefault(instance.shape.role, []).append(
            instance.busy_s / duration_s if duration_s else 0.0
        )
        used = 1 - instance.min_free_blocks / instance.shape.num_blocks
        kv.setdefault(instance.shape.role, []).append(used)
    bytes_per_s = cluster.num_bytes_moved / duration_s if duration_s else 0.0
    narrower = min(split.num_prefill, split.num_decode) or 1
    link = next(iter(cluster.instances.values())).shape.durations.link_bytes_per_s
    return Trial(
        split=split,
        rate=rate,
        num_requests=len(served),
        num_good=num_good,
        duration_s=duration_s,
        num_output_tokens=sum(len(request.token_s) for request in served),
        ttft_ms=_ms([request.ttft_s for request in served]),
        tpot_ms=_ms([request.tpot_s for request in served]),
        gap_ms=_ms([request.largest_gap_s for request in served]),
        e2e_ms=_ms([request.e2e_s for request in served]),
        misses=dict(misses),
        busy_shares={role: float(np.mean(shares)) for role, shares in by_role.items()},
        kv_shares={role: max(shares) for role, shares in kv.items()},
        num_preemptions=sum(instance.num_preemptions for instance in cluster.instances.values()),
        transfer_bytes_per_s=bytes_per_s,
        link_share=bytes_per_s / (narrower * link),
    )


def _ms(values_s: Sequence[float | None]) -> Distribution | None:
    summary = Distribution.of([value for value in values_s if value is not None])
    return None if summary is None else summary.scaled(1e3)
