"""The parameters that a worker process receives at its start. Separate from the process itself, so that the
head needs none of its imports."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..core.config import ClusterConfig, PoolSection
from ..core.devices import DeviceKind
from ..core.log_settings import LogSettings
from ..core.messages import Role
from ..core.needs import Need


@dataclass(frozen=True)
class WorkerSpec:
    """Describes a worker process. `cores` are positions in the list of cores that its node lets it use."""

    worker_id: str
    incarnation: int
    role: Role
    config: ClusterConfig
    device: DeviceKind  # resolved from the configuration's
    num_blocks: int | None  # None: as many as the GPU has room for
    router_address: tuple[str, int]
    token: str
    host: str | None  # the address at which peers reach this node; None: Ray's address of it
    log: LogSettings | None = None  # None: Python's default
    cores: tuple[int, ...] = ()  # decided when the process is placed
    socket_root: Path = Path("/tmp")  # the transfer endpoint creates its private folder here
    accept_open_ray: bool = False  # no other user can reach the hosts
    memory_bytes: int = 0  # host memory that it will fill; 0 on GPUs, where host memory is not planned
    rank: int = 0  # of the instance's `num_ranks` processes; rank 0 is the worker, the others compute for it

    @property
    def key(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation

    @property
    def num_ranks(self) -> int:
        return self.pool.tensor_parallel

    @property
    def name(self) -> str:
        """Returns the name of the process in logs."""
        rank = f".{self.rank}" if self.num_ranks > 1 else ""
        return f"{self.worker_id}/{self.incarnation}{rank}"

    def of_rank(self, rank: int, cores: tuple[int, ...]) -> "WorkerSpec":
        """Returns the description of one rank's process, given the cores of the instance."""
        num_cores = len(cores) // self.num_ranks
        return replace(self, rank=rank, cores=cores[rank * num_cores : (rank + 1) * num_cores])

    @property
    def need(self) -> Need:
        """Returns the resources that all ranks take of their node."""
        pool = self.pool
        on_gpu = self.device == "cuda"
        num_cores = pool.num_host_cores if on_gpu else pool.devices_per_instance
        gpu_share = pool.gpu_share if on_gpu else None
        return Need(num_cores, min(1.0, pool.num_cpus / num_cores), gpu_share, self.memory_bytes)

    @property
    def pool(self) -> PoolSection:
        """Returns the pool whose limits apply to this worker."""
        return self.config.pools.decode if self.role is Role.DECODE else self.config.pools.prefill
