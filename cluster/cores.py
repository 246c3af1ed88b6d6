"""Which cores, and which machine's GPU, an instance gets. Pure bookkeeping: nodes in, positions of cores and GPUs out."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import CapacityError
from ..core.gpu_shares import GpuShares

_EPSILON = 1e-6


@dataclass(frozen=True)
class Need:
    """What one instance takes of a node."""

    num_cores: int
    core_share: float  # of each of them, 0 to 1
    gpu_share: float | None = None  # of one GPU; None: it needs none


@dataclass(frozen=True)
class Placement:
    """Cores of one node, by their position among those the node may use.

    `gpu` is the GPU that Ray will give the instance, as we keep count of them by Ray's rule. It is for counting alone: Ray
    knows what others have taken, so the worker is told its GPU by Ray.
    """

    node_id: str
    cores: tuple[int, ...]
    gpu: int | None = None


class CoreAllocator:
    """Gives each instance cores of its own, or shares of cores when instances are configured to share; of GPUs likewise."""

    def __init__(self, num_cores: Mapping[str, int], num_gpus: Mapping[str, int] | None = None) -> None:
        self._free = {node_id: [1.0] * count for node_id, count in num_cores.items()}
        self._gpus = {node_id: GpuShares((num_gpus or {}).get(node_id, 0)) for node_id in num_cores}
        self._num_gpus = sum((num_gpus or {}).values())
        self._taken: dict[tuple[str, int], tuple[Placement, Need]] = {}

    def take(self, worker: tuple[str, int], need: Need) -> Placement:
        """Cores of one node, the emptiest first. On GPUs the fullest that has room, close to those that are in use.

        Raises CapacityError when no node has them.
        """
        assert worker not in self._taken
        fitting = [node_id for node_id in self._free if self._fits(node_id, need)]
        if not fitting:
            raise CapacityError(self._what_is_missing(worker[0], need))
        node_id = min(fitting, key=lambda node_id: self._rank(node_id, need))
        free = self._free[node_id]
        cores = sorted(self._fitting_cores(node_id, need), key=lambda core: -free[core])[: need.num_cores]
        gpu = None if need.gpu_share is None else self._gpus[node_id].find(need.gpu_share)
        placement = Placement(node_id, tuple(sorted(cores)), gpu)
        self.take_back(worker, placement, need)
        return placement

    def take_back(self, worker: tuple[str, int], placement: Placement, need: Need) -> None:
        """The instance runs there already."""
        for core in placement.cores:
            self._free[placement.node_id][core] -= need.core_share
        if placement.gpu is not None and need.gpu_share is not None:
            self._gpus[placement.node_id].take_back(placement.gpu, need.gpu_share)
        self._taken[worker] = (placement, need)

    def give_back(self, worker: tuple[str, int]) -> None:
        """Free what an instance has; one that has nothing is ignored."""
        taken = self._taken.pop(worker, None)
        if taken is None:
            return
        placement, need = taken
        for core in placement.cores:
            self._free[placement.node_id][core] += need.core_share
        if placement.gpu is not None and need.gpu_share is not None:
            self._gpus[placement.node_id].give_back(placement.gpu, need.gpu_share)

    def _fitting_cores(self, node_id: str, need: Need) -> list[int]:
        return [core for core, left in enumerate(self._free[node_id]) if left >= need.core_share - _EPSILON]

    def _fits(self, node_id: str, need: Need) -> bool:
        has_gpu = need.gpu_share is None or self._gpus[node_id].find(need.gpu_share) is not None
        return has_gpu and len(self._fitting_cores(node_id, need)) >= need.num_cores

    def _rank(self, node_id: str, need: Need) -> tuple[float, ...]:
        gpus = () if need.gpu_share is None else self._gpus[node_id].rank(need.gpu_share)
        return (*gpus, -sum(self._free[node_id]))

    def _what_is_missing(self, worker_id: str, need: Need) -> str:
        left, num_cores = sum(map(sum, self._free.values())), sum(map(len, self._free.values()))
        needs = f"{need.num_cores} core(s) with {need.core_share:g} of each free"
        free = f"{num_cores} core(s) only {left:g} are"
        if need.gpu_share is not None:
            num_free_gpus = sum(gpus.num_free for gpus in self._gpus.values())
            needs += f" on a node with {need.gpu_share:g} of a GPU free"
            free = f"{self._num_gpus} GPU(s) only {num_free_gpus:g}, and of its {num_cores} core(s) only {left:g}, are"
        return f"{worker_id} needs {needs}, but of the cluster's {free} free"
