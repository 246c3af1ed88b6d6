"""What a worker process is told at its start. Apart from the process itself, so that the head needs none of its imports."""

from dataclasses import dataclass

from ..core.config import ClusterConfig, PoolSection
from ..core.messages import Role
from ..telemetry.logs import LogSettings


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process is to be. `cores` are positions in the list of cores that its node lets it use."""

    worker_id: str
    incarnation: int
    role: Role
    config: ClusterConfig
    num_blocks: int
    router_address: tuple[str, int]
    token: str
    host: str | None  # the address that peers reach this node by; None: as Ray knows it
    log: LogSettings | None = None  # None: as Python does by default
    cores: tuple[int, ...] = ()  # decided when the process is placed

    @property
    def key(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation

    @property
    def core_share(self) -> float:
        """Of each of its cores, how much it takes."""
        return min(1.0, self.pool.num_cpus / self.pool.devices_per_instance)

    @property
    def pool(self) -> PoolSection:
        """The pool whose limits hold for this worker."""
        return self.config.pools.decode if self.role is Role.DECODE else self.config.pools.prefill
