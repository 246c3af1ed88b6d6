"""The interfaces through which the head reaches the processes and hosts of its cluster. `cluster` implements
them over Ray."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.config import ClusterConfig
from ..core.devices import DeviceKind
from ..engine.gpu import Node
from ..router.cores import Placement
from ..router.hosts import HostChecked, SeenHost
from ..worker.spec import WorkerSpec

Key = tuple[str, int]  # (worker_id, incarnation)
Version = tuple[
    int, int
]  # of a configuration: its head's generation, and its number among those of that head


@dataclass(frozen=True)
class InstanceResources:
    """The resources that one instance reserves on its host."""

    num_cpus: float
    gpu_share: float | None  # None: no GPU


@dataclass(frozen=True)
class Outcome:
    """The way a worker's process ended. `is_reported`: the worker itself reported why. `has_died`: it did not
    end in order, and its host is up."""

    reason: str
    is_reported: bool = False
    has_died: bool = False


class Keeper(Protocol):
    """Holds the state that outlives a head: the workers' processes, and the configuration in force."""

    def start(self, spec: WorkerSpec, placement: Placement) -> None: ...

    async def ended(self, key: Key) -> Outcome:
        """Returns when nothing is left of the process, or of the keeper, which every process dies with."""
        ...

    def stop(self, key: Key) -> None:
        """Asks the process to end."""
        ...

    def kill(self, key: Key) -> None: ...

    async def living(self) -> list[tuple[WorkerSpec, Placement]]:
        """Returns the running processes that this head or an earlier one has started, oldest first."""
        ...

    async def config(self) -> ClusterConfig: ...

    def remember(self, config: ClusterConfig, version: Version) -> None:
        """Stores the configuration; the newest version is kept, regardless of the order of arrival."""
        ...


class Nodes(Protocol):
    """The hosts that have joined, and their properties."""

    async def seen(self) -> tuple[SeenHost, ...]:
        """Returns the hosts that are alive, the head's first."""
        ...

    def node(self, node_id: str) -> Node:
        """Returns the resources of a host that has answered, as far as instances may use them."""
        ...

    async def ask_all(self, timeout_s: float) -> tuple[Node, ...]:
        """Returns all hosts that answer in time, the head's first; the others' answers may arrive later."""
        ...

    async def ask_here(self) -> tuple[Node, ...]:
        """Returns the head's host alone."""
        ...

    async def check(self, node_id: str, config: ClusterConfig, device: DeviceKind) -> HostChecked:
        """Asks the host, and judges whether instances may start there."""
        ...

    async def request(self, instances: Sequence[InstanceResources]) -> None:
        """Asks for hosts that together have room for these instances, running ones included, in place of
        what was asked before."""
        ...


FindNodes = Callable[
    [str, tuple[str, int]], Nodes
]  # by the model's path, and the address where workers reach the router
