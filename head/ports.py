"""The interfaces through which the head reaches the processes and hosts of its cluster. `cluster` implements
them over Ray."""

from collections.abc import Callable
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
class Outcome:
    """How a worker's process ended. `is_told`: the worker itself said why."""

    reason: str
    is_told: bool = False


class Keeper(Protocol):
    """Holds what outlives a head: the workers' processes, and the configuration in force."""

    def start(self, spec: WorkerSpec, placement: Placement) -> None: ...

    async def ended(self, key: Key) -> Outcome:
        """Returns when nothing is left of the process, or of the keeper, which no process outlives."""
        ...

    def stop(self, key: Key) -> None:
        """Ask the process to end."""
        ...

    def kill(self, key: Key) -> None: ...

    async def living(self) -> list[tuple[WorkerSpec, Placement]]:
        """The processes that this head or one before it has started, oldest first."""
        ...

    async def config(self) -> ClusterConfig: ...

    def remember(self, config: ClusterConfig, version: Version) -> None:
        """The newest version is kept, in whichever order they arrive."""
        ...


class Nodes(Protocol):
    """The hosts that have joined: which there are, and what each of them is like."""

    async def seen(self) -> tuple[SeenHost, ...]:
        """Those that are alive, the head's first."""
        ...

    def node(self, node_id: str) -> Node:
        """The resources of a host that has answered, as far as instances may use them."""
        ...

    async def ask_all(self, timeout_s: float) -> tuple[Node, ...]:
        """All that are there and answer in time, the head's first; the others' answers may come later."""
        ...

    async def ask_here(self) -> tuple[Node, ...]:
        """The head's host alone."""
        ...

    async def check(self, node_id: str, config: ClusterConfig, device: DeviceKind) -> HostChecked:
        """Ask the host, and judge whether instances may start there."""
        ...


FindNodes = Callable[
    [str, tuple[str, int]], Nodes
]  # by the model's path, and the address where workers reach the router
