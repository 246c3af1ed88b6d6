"""Which machine would hold which instances, by cores first and then by memory. Pure arithmetic for `engine.plan`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.config_types import format_size
from ..core.errors import CapacityError, PdserveError
from ..core.messages import Role
from .gpu import Node

_ROUNDING = 1e-9  # ten instances of 0.1 cores fit on one


@dataclass(frozen=True)
class Finding:
    """One reason why a configuration cannot be served."""

    error: type[PdserveError]  # ConfigError: wrong on any machine; CapacityError: too much for these ones
    message: str


@dataclass(frozen=True)
class Demand:
    """What one instance needs."""

    role: Role
    num_cpus: float  # reserved
    num_devices: int  # computed on, shared or not
    fixed_bytes: int  # all but the KV cache
    kv_bytes: int | None  # None: by free memory


@dataclass(frozen=True)
class Load:
    """One machine and the instances it would hold."""

    node: Node
    demands: list[Demand] = field(default_factory=list)

    @property
    def num_free_cpus(self) -> float:
        return len(self.node.cores) - sum(demand.num_cpus for demand in self.demands)

    def takes(self, demand: Demand) -> bool:
        return demand.num_devices <= len(self.node.cores) and demand.num_cpus <= self.num_free_cpus + _ROUNDING


class Packing:
    """Instances spread over machines: the largest first, each to the machine with most free cores."""

    def __init__(self, demands: Sequence[Demand], nodes: Sequence[Node]) -> None:
        self._demands = demands
        self._loads = [Load(node) for node in nodes]
        self._unplaced: list[Demand] = []
        for demand in sorted(demands, key=lambda one: one.num_cpus, reverse=True):
            load = max((load for load in self._loads if load.takes(demand)), key=_free_cpus, default=None)
            (self._unplaced if load is None else load.demands).append(demand)

    def auto_kv_bytes(self, memory_fraction: float) -> int | None:
        """What each KV cache that is sized by free memory may take; None when there is no such cache."""
        shares = []
        for load in self._loads:
            num_auto = sum(demand.kv_bytes is None for demand in load.demands)
            taken = sum(demand.fixed_bytes + (demand.kv_bytes or 0) for demand in load.demands)
            if num_auto:
                shares.append((int(load.node.available_memory_bytes * memory_fraction) - taken) // num_auto)
        return min(shares, default=None)

    def core_findings(self) -> Iterator[Finding]:
        if not self._unplaced:
            return
        most = max((len(load.node.cores) for load in self._loads), default=0)
        for demand in {demand.role: demand for demand in self._unplaced if demand.num_devices > most}.values():
            yield Finding(
                CapacityError,
                f"pools.{demand.role.value}.devices_per_instance: {demand.num_devices} cores for one instance, "
                f"but there are {most} on {_this_machine(self._loads, 'the largest machine')}",
            )
        if all(demand.num_devices > most for demand in self._unplaced):
            return
        needed = sum(demand.num_cpus for demand in self._demands)
        present = sum(len(load.node.cores) for load in self._loads)
        yield Finding(
            CapacityError,
            f"pools: {_counted(self._demands)} need {needed:g} cores, but there are {present} on "
            f"{_this_machine(self._loads, f'{len(self._loads)} machines')}, where {_counted(self._unplaced)} found no room; "
            "lower instances, or set cpus_per_instance to a fraction so that instances share a core",
        )

    def memory_findings(self, kv_bytes: Mapping[Role, int]) -> Iterator[Finding]:
        """`kv_bytes`: the KV cache of an instance of each pool."""
        for load in self._loads:
            needed = sum(demand.fixed_bytes + kv_bytes[demand.role] for demand in load.demands)
            available = load.node.available_memory_bytes
            if needed <= available:
                continue
            each = {
                demand.role: f"{format_size(kv_bytes[demand.role])} of KV and {format_size(demand.fixed_bytes)} beside it "
                f"for a {demand.role.value} instance"
                for demand in load.demands
            }
            yield Finding(
                CapacityError,
                f"memory: {_counted(load.demands)} need {format_size(needed)} ({', '.join(each.values())}), but "
                f"{format_size(available)} are available on {load.node.name}; lower instances, model.max_model_len, "
                "max_batch_tokens or kv_cache_bytes",
            )


def _free_cpus(load: Load) -> float:
    return load.num_free_cpus


def _this_machine(loads: Sequence[Load], many: str) -> str:
    return "this machine" if len(loads) == 1 else many


def _counted(demands: Sequence[Demand]) -> str:
    counts = Counter(demand.role for demand in demands)
    parts = [f"{count} {role.value} instance{'s'[: count != 1]}" for role, count in counts.items()]
    return " and ".join(parts)
