"""Allocates cores and a GPU of a host to each instance. Pure bookkeeping: hosts in, positions of cores and
GPUs out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from math import inf

from ..core.config_types import format_size
from ..core.gpu_shares import EPSILON, GpuShares
from ..core.needs import Need
from .ranking import Ranking

MAX_NEEDS = 16  # kinds of instances whose hosts are kept in order
Key = tuple[str, int]  # (worker_id, incarnation)


@dataclass(frozen=True)
class Capacity:
    """The resources of a host that instances may take."""

    num_cores: int
    num_gpus: int = 0
    num_bytes: float = inf  # of its memory


@dataclass(frozen=True)
class Placement:
    """Cores of one host, by their position among those that Ray's node may use.

    `gpu` is the GPU that Ray will give the instance, as we count them by Ray's rule. It serves bookkeeping
    alone: Ray knows which GPUs others have taken, so the worker gets its GPU from Ray."""

    node_id: str
    cores: tuple[int, ...]
    gpu: int | None = None


@dataclass
class _Free:
    """The free resources of a host."""

    capacity: Capacity
    number: int  # in order of opening
    cores: list[float] = field(init=False)
    gpus: GpuShares = field(init=False)
    num_bytes: float = field(init=False)

    def __post_init__(self) -> None:
        self.cores = [1.0] * self.capacity.num_cores
        self.gpus = GpuShares(self.capacity.num_gpus)
        self.num_bytes = self.capacity.num_bytes

    def change(self, placement: Placement, need: Need, sign: int) -> None:
        """Takes (-1) or gives back (1) the resources of a placement."""
        for core in placement.cores:
            self.cores[core] += sign * need.core_share
        self.num_bytes += sign * need.num_bytes
        if placement.gpu is not None and need.gpu_share is not None:
            (self.gpus.give_back if sign > 0 else self.gpus.take_back)(placement.gpu, need.gpu_share)

    def fitting_cores(self, need: Need) -> list[int]:
        return [core for core, left in enumerate(self.cores) if left >= need.core_share - EPSILON]

    def has_cores(self, need: Need) -> bool:
        has_gpu = need.gpu_share is None or self.gpus.find(need.gpu_share) is not None
        return has_gpu and len(self.fitting_cores(need)) >= need.num_cores

    def fits(self, need: Need) -> bool:
        return self.has_cores(need) and self.num_bytes >= need.num_bytes

    def rank(self, need: Need) -> tuple[float, ...]:
        gpus = () if need.gpu_share is None else self.gpus.rank(need.gpu_share)
        return (*gpus, -sum(self.cores), self.number)


class CoreAllocator:
    """Gives each instance cores of its own, or shares of cores when instances are configured to share;
    likewise for GPUs."""

    def __init__(self, hosts: Mapping[str, Capacity] | None = None) -> None:
        self._free: dict[str, _Free] = {}
        self._taken: dict[Key, tuple[Placement, Need]] = {}
        self._on: dict[str, dict[Key, None]] = {}  # the instances of each node, in order
        self._numbers = count()
        self._fitting: dict[Need, Ranking[_Free]] = {}  # the hosts with room, by node id
        self._missing: dict[Need, str | None] = {}  # texts, until something changes
        for node_id, capacity in (hosts or {}).items():
            self.open(node_id, capacity)

    def open(self, node_id: str, capacity: Capacity) -> None:
        """Opens a host for placement. Instances that are already running there are counted."""
        free = self._free[node_id] = _Free(capacity, next(self._numbers))
        for worker in self.on(node_id):
            free.change(*self._taken[worker], -1)
        self._rank(node_id)

    def close(self, node_id: str) -> None:
        """Closes a host for placement; instances that are running there stay until they give back their
        resources."""
        self._free.pop(node_id, None)
        self._rank(node_id)

    def _rank(self, node_id: str) -> None:
        """Follows every change of a host: it is among those that have room, or not."""
        self._missing.clear()
        free = self._free.get(node_id)
        for need, ranking in self._fitting.items():
            if free is not None and free.fits(need):
                ranking.put(node_id, free.rank(need), free)
            else:
                ranking.discard(node_id)

    def _ranking(self, need: Need) -> Ranking[_Free]:
        if need not in self._fitting:
            if len(self._fitting) == MAX_NEEDS:
                del self._fitting[next(iter(self._fitting))]
            ranking = self._fitting[need] = Ranking()
            for node_id, free in self._free.items():
                if free.fits(need):
                    ranking.put(node_id, free.rank(need), free)
        return self._fitting[need]

    def on(self, node_id: str) -> list[Key]:
        """Returns the instances on a host."""
        return list(self._on.get(node_id, ()))

    def node_of(self, worker: Key) -> str | None:
        """Returns the node on which an instance runs; None for one without a place."""
        taken = self._taken.get(worker)
        return None if taken is None else taken[0].node_id

    def num_taken(self, node_id: str) -> tuple[float, float]:
        """Returns the numbers of cores and GPUs of a host that instances have taken."""
        needs = [self._taken[worker][1] for worker in self.on(node_id)]
        return sum(need.num_cores * need.core_share for need in needs), sum(
            need.gpu_share or 0.0 for need in needs
        )

    def num_bytes_taken(self, node_id: str) -> int:
        return sum(self._taken[worker][1].num_bytes for worker in self.on(node_id))

    def take(self, worker: Key, need: Need) -> Placement | None:
        """Allocates cores of one host, the emptiest first; None when no host has room. With GPUs, the fullest
        host that has room, close to the GPUs in use."""
        assert worker not in self._taken
        node_id = self._ranking(need).first_name()
        if node_id is None:
            return None
        free = self._free[node_id]
        cores = sorted(free.fitting_cores(need), key=lambda core: -free.cores[core])[: need.num_cores]
        gpu = None if need.gpu_share is None else free.gpus.find(need.gpu_share)
        placement = Placement(node_id, tuple(sorted(cores)), gpu)
        self.take_back(worker, placement, need)
        return placement

    def take_back(self, worker: Key, placement: Placement, need: Need) -> None:
        """Registers an instance that is already running, on a host that may not be open."""
        self._taken[worker] = (placement, need)
        self._on.setdefault(placement.node_id, {})[worker] = None
        self._change(placement, need, -1)

    def give_back(self, worker: Key) -> None:
        """Frees the resources of an instance; one that has none is ignored."""
        if worker not in self._taken:
            return
        placement, need = self._taken.pop(worker)
        del self._on[placement.node_id][worker]
        if not self._on[placement.node_id]:
            del self._on[placement.node_id]
        self._change(placement, need, 1)

    def _change(self, placement: Placement, need: Need, sign: int) -> None:
        if placement.node_id in self._free:
            self._free[placement.node_id].change(placement, need, sign)
            self._rank(placement.node_id)

    def what_is_missing(self, worker_id: str, need: Need) -> str | None:
        """Describes the missing resources; None when there is room."""
        if need not in self._missing:
            self._missing[need] = self._what_is_missing(need)
        missing = self._missing[need]
        return None if missing is None else f"{worker_id} needs {missing}"

    def _what_is_missing(self, need: Need) -> str | None:
        hosts = self._free.values()
        if any(free.fits(need) for free in hosts):
            return None
        left, num_cores = sum(sum(free.cores) for free in hosts), sum(len(free.cores) for free in hosts)
        if any(free.has_cores(need) for free in hosts):
            most = max(free.num_bytes for free in hosts if free.has_cores(need))
            return (
                f"{format_size(need.num_bytes)} of memory, but of the hosts with free cores"
                f" none has more than {format_size(max(0, int(most)))} left"
            )
        needs = f"{need.num_cores} core(s) with {need.core_share:g} of each free"
        free_now = f"{num_cores} core(s) only {left:g} are"
        if need.gpu_share is not None:
            num_gpus = sum(free.capacity.num_gpus for free in hosts)
            num_free_gpus = sum(free.gpus.num_free for free in hosts)
            needs += f" on a node with {need.gpu_share:g} of a GPU free"
            free_now = (
                f"{num_gpus} GPU(s) only {num_free_gpus:g}, and of its {num_cores} core(s) only {left:g}, are"
            )
        return f"{needs}, but of the cluster's {free_now} free"
