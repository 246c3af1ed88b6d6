"""The assignment of instances to machines, by GPUs and cores first and then by memory. Pure arithmetic for
`planner.plan`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.config_types import format_size
from ..core.errors import CapacityError, PdserveError
from ..core.gpu_shares import GpuShares
from ..core.messages import Role
from ..engine.gpu import DeviceInfo, Node

_ROUNDING = 1e-9  # ten instances of 0.1 cores fit on one


@dataclass(frozen=True)
class Finding:
    """One reason why a configuration cannot be served."""

    error: type[PdserveError]  # ConfigError: wrong on any machine; CapacityError: too much for these ones
    message: str


@dataclass(frozen=True)
class Demand:
    """The resources that one instance needs. Its bytes are the GPU's where it computes on one, otherwise the
    machine's."""

    role: Role
    num_cpus: float  # reserved
    num_cores: int  # that it runs on, shared or not
    fixed_bytes: int  # all but the KV cache
    kv_bytes: int | None  # None: by free memory
    gpu_share: float | None = None  # share of one GPU; None: it computes on its cores


@dataclass
class HostLoad:
    """One machine and the instances it would hold."""

    node: Node
    demands: list[Demand] = field(default_factory=list)
    on_gpus: list[list[Demand]] = field(init=False)  # by GPU
    shares: GpuShares = field(init=False)

    def __post_init__(self) -> None:
        num_gpus = len(self.node.usable_devices)
        self.on_gpus = [[] for _ in range(num_gpus)]
        self.shares = GpuShares(num_gpus)

    @property
    def num_free_cpus(self) -> float:
        return len(self.node.cores) - sum(demand.num_cpus for demand in self.demands)

    def takes(self, demand: Demand) -> bool:
        if demand.gpu_share is not None and self.shares.find(demand.gpu_share) is None:
            return False
        return demand.num_cores <= len(self.node.cores) and demand.num_cpus <= self.num_free_cpus + _ROUNDING

    def put(self, demand: Demand) -> None:
        self.demands.append(demand)
        if demand.gpu_share is not None:
            self.on_gpus[self.shares.take(demand.gpu_share)].append(demand)

    def rank(self, demand: Demand) -> tuple[float, ...]:
        """The least takes it: the fullest GPU that has room, on the machine with least free GPUs; then the
        most free cores."""
        gpus = () if demand.gpu_share is None else self.shares.rank(demand.gpu_share)
        return (*gpus, -self.num_free_cpus)


class Packing:
    """Instances spread over machines: the largest first, each to the machine with most free cores, or, on
    GPUs, close to each other."""

    def __init__(self, demands: Sequence[Demand], nodes: Sequence[Node]) -> None:
        self._demands = demands
        self.loads = [HostLoad(node) for node in nodes]
        self._unplaced: list[Demand] = []
        for demand in sorted(demands, key=lambda one: (one.gpu_share or 0.0, one.num_cpus), reverse=True):
            fitting = [load for load in self.loads if load.takes(demand)]
            if fitting:
                min(fitting, key=lambda load: load.rank(demand)).put(demand)
            else:
                self._unplaced.append(demand)

    def auto_kv_bytes(self, memory_fraction: float, *, fill_first: bool = False) -> int | None:
        """Bytes for each KV cache that is sized by free memory; None when there is no such cache.
        `fill_first`: by the first machine that has cores for an instance, with as many instances as it could
        hold."""
        loads = self._filled() if fill_first else self.loads
        shares = []
        for load in loads:
            num_auto = sum(demand.kv_bytes is None for demand in load.demands)
            taken = sum(demand.fixed_bytes + (demand.kv_bytes or 0) for demand in load.demands)
            if num_auto:
                shares.append((int(load.node.available_memory_bytes * memory_fraction) - taken) // num_auto)
        return min(shares, default=None)

    def _filled(self) -> list[HostLoad]:
        """The first machine that holds an instance, filled with the smallest ones."""
        for node in (load.node for load in self.loads):
            filled = HostLoad(node)
            for demand in sorted(self._demands, key=lambda one: one.num_cpus):
                if filled.takes(demand):
                    filled.put(demand)
            if filled.demands:
                return [filled]
        return []

    def gpu_kv_bytes(self, memory_fraction: float) -> Mapping[Role, int]:
        """The bytes left for KV in an instance's share, by role, where they are fewest."""
        left: dict[Role, int] = {}
        for _, device, demand in self._on_gpus():
            num_bytes = share_bytes(device, demand, memory_fraction) - demand.fixed_bytes
            left[demand.role] = min(num_bytes, left.get(demand.role, num_bytes))
        return left

    def core_findings(self) -> Iterator[Finding]:
        """Reports too few cores or GPUs. The absence of any GPU is reported elsewhere."""
        if not self._unplaced or (
            self._unplaced[0].gpu_share is not None and not any(load.on_gpus for load in self.loads)
        ):
            return
        most = max((len(load.node.cores) for load in self.loads), default=0)
        for demand in {demand.role: demand for demand in self._unplaced if demand.num_cores > most}.values():
            key = "devices_per_instance" if demand.gpu_share is None else "cpus_per_instance"
            yield Finding(
                CapacityError,
                f"pools.{demand.role.value}.{key}: {demand.num_cores} cores for one instance, "
                f"but there are {most} on {_this_machine(self.loads, 'the largest machine')}",
            )
        if all(demand.num_cores > most for demand in self._unplaced):
            return
        needed, present = (
            sum(demand.num_cpus for demand in self._demands),
            sum(len(load.node.cores) for load in self.loads),
        )
        what, key, shared = "cores", "cpus_per_instance", "core"
        if any(
            demand.gpu_share is not None and not self._has_gpu(demand.gpu_share) for demand in self._unplaced
        ):
            needed = sum(demand.gpu_share or 0.0 for demand in self._demands)
            present = sum(len(load.on_gpus) for load in self.loads)
            what, key, shared = "GPUs", "gpus_per_instance", "GPU"
        yield Finding(
            CapacityError,
            f"pools: {_counted(self._demands)} need {needed:g} {what}, but there"
            f" {'is' if present == 1 else 'are'} {present} on"
            f" {_this_machine(self.loads, f'{len(self.loads)} machines')}, where {_counted(self._unplaced)}"
            f" found no room; lower instances, or set {key} to a fraction so that instances share a {shared}",
        )

    def memory_findings(self, kv_bytes: Mapping[Role, int]) -> Iterator[Finding]:
        """`kv_bytes`: the KV cache of an instance of each pool."""
        for load in self.loads:
            needed = sum(demand.fixed_bytes + kv_bytes[demand.role] for demand in load.demands)
            available = load.node.available_memory_bytes
            if needed <= available:
                continue
            each = {
                demand.role: (
                    f"{format_size(kv_bytes[demand.role])} of KV and {format_size(demand.fixed_bytes)} beside"
                    f" it for a {demand.role.value} instance"
                )
                for demand in load.demands
            }
            yield Finding(
                CapacityError,
                f"memory: {_counted(load.demands)} need {format_size(needed)} ({', '.join(each.values())}),"
                f" but {format_size(available)} are available on {load.node.name}; lower instances,"
                " model.max_model_len, max_batch_tokens or kv_cache_bytes",
            )

    def gpu_memory_findings(self, kv_bytes: Mapping[Role, int], memory_fraction: float) -> Iterator[Finding]:
        """`kv_bytes`: the KV cache of an instance of each pool. Reports the first of each pool that does not
        fit."""
        reported: set[Role] = set()
        for node, device, demand in self._on_gpus():
            needed, share = (
                demand.fixed_bytes + kv_bytes[demand.role],
                share_bytes(device, demand, memory_fraction),
            )
            if needed <= share or demand.role in reported:
                continue
            reported.add(demand.role)
            yield Finding(
                CapacityError,
                f"GPU memory: a {demand.role.value} instance needs {format_size(needed)}"
                f" ({format_size(kv_bytes[demand.role])} of KV and {format_size(demand.fixed_bytes)} beside"
                f" it), but has {format_size(share)} on GPU {device.index} of {node.name}"
                f" ({memory_fraction:g} of {format_size(device.total_bytes)}, times"
                f" pools.{demand.role.value}.gpus_per_instance: {demand.gpu_share:g}); raise"
                " gpus_per_instance, or lower model.max_model_len, max_batch_tokens or kv_cache_bytes",
            )

    def _on_gpus(self) -> Iterator[tuple[Node, DeviceInfo, Demand]]:
        for load in self.loads:
            for device, demands in zip(load.node.usable_devices, load.on_gpus, strict=True):
                for demand in demands:
                    yield load.node, device, demand

    def _has_gpu(self, share: float) -> bool:
        return any(load.shares.find(share) is not None for load in self.loads)


def share_bytes(device: DeviceInfo, demand: Demand, memory_fraction: float) -> int:
    """The memory of a GPU that one instance may fill."""
    assert demand.gpu_share is not None
    return int(device.total_bytes * memory_fraction * demand.gpu_share)


def _this_machine(loads: Sequence[HostLoad], many: str) -> str:
    return "this machine" if len(loads) == 1 else many


def _counted(demands: Sequence[Demand]) -> str:
    counts = Counter(demand.role for demand in demands)
    parts = [f"{count} {role.value} instance{'s'[: count != 1]}" for role, count in counts.items()]
    return " and ".join(parts)
