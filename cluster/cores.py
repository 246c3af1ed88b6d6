"""Which cores an instance gets. Pure bookkeeping: nodes and their cores in, positions of cores out."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import CapacityError

_EPSILON = 1e-6


@dataclass(frozen=True)
class Placement:
    """Cores of one node, by their position among those the node may use."""

    node_id: str
    cores: tuple[int, ...]


class CoreAllocator:
    """Gives each instance cores of its own, or shares of cores when instances are configured to share."""

    def __init__(self, num_cores: Mapping[str, int]) -> None:
        self._free = {node_id: [1.0] * count for node_id, count in num_cores.items()}
        self._taken: dict[tuple[str, int], tuple[Placement, float]] = {}

    def take(self, worker: tuple[str, int], num_cores: int, share: float) -> Placement:
        """`num_cores` cores of one node with `share` (0 to 1) of each, the emptiest first.

        Raises CapacityError when no node has them.
        """
        assert worker not in self._taken
        for node_id, free in sorted(self._free.items(), key=lambda item: -sum(item[1])):
            fitting = [core for core, left in enumerate(free) if left >= share - _EPSILON]
            if len(fitting) >= num_cores:
                fitting.sort(key=lambda core: -free[core])
                placement = Placement(node_id, tuple(sorted(fitting[:num_cores])))
                for core in placement.cores:
                    free[core] -= share
                self._taken[worker] = (placement, share)
                return placement
        left = sum(map(sum, self._free.values()))
        raise CapacityError(
            f"{worker[0]} needs {num_cores} core(s) with {share:g} of each free, but of the cluster's "
            f"{sum(map(len, self._free.values()))} core(s) only {left:g} are free"
        )

    def take_back(self, worker: tuple[str, int], placement: Placement, share: float) -> None:
        """The instance runs there already."""
        for core in placement.cores:
            self._free[placement.node_id][core] -= share
        self._taken[worker] = (placement, share)

    def give_back(self, worker: tuple[str, int]) -> None:
        """Free an instance's cores; one that has none is ignored."""
        taken = self._taken.pop(worker, None)
        if taken is not None:
            placement, share = taken
            for core in placement.cores:
                self._free[placement.node_id][core] += share
