"""The resources that a worker's process computes on: its cores, its GPU, and the engine's share of them."""

import os

from ..core.devices import DeviceKind
from ..core.errors import CapacityError
from ..engine.engine import EngineOptions
from ..engine.gpu import GPU_MEMORY_FRACTION, DeviceInfo, probe_devices
from .spec import WorkerSpec

# upper bound on how long a busy engine thread holds back those of the transfer and the connection
SWITCH_INTERVAL_S = 0.0005


def bind_to_cores(positions: tuple[int, ...]) -> tuple[int, ...]:
    """Binds this process, and every thread it will start, to cores given by position; returns their
    numbers."""
    available = sorted(os.sched_getaffinity(0))
    cores = tuple(available[position] for position in positions)
    os.sched_setaffinity(0, cores)
    return cores


def own_gpu(device: DeviceKind) -> DeviceInfo | None:
    """Returns the GPU that torch will use, the first that is visible to this process; None for a worker that
    needs none.

    Raises CapacityError when there is none.
    """
    if device == "cpu":
        return None
    devices = probe_devices()
    if not devices:
        raise CapacityError(f"device: cuda, but this process is shown no GPU on {os.uname().nodename}")
    return devices[0]


def names_of(cores: tuple[int, ...], gpu: DeviceInfo | None) -> tuple[str, ...]:
    """Returns the devices in the form of `WorkerInfo.devices`."""
    return tuple(f"cpu:{core}" for core in cores) if gpu is None else (f"cuda:{gpu.uuid}",)


def engine_options(spec: WorkerSpec) -> EngineOptions:
    config, pool = spec.config, spec.pool
    return EngineOptions(
        dtype=config.model.dtype,
        device=spec.device,
        block_size=config.kv.num_tokens_per_block(spec.device),
        num_blocks=spec.num_blocks,
        memory_fraction=GPU_MEMORY_FRACTION * pool.gpu_share,
        max_model_len=None if config.model.max_model_len == "auto" else config.model.max_model_len,
        max_batch_size=pool.max_batch_size,
        max_batch_tokens=pool.max_batch_tokens,
        kernels=config.kernels,
        num_threads=pool.num_threads_per_rank,
        wire=config.kv.wire,
    )
