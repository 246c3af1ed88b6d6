"""The state of the workers' GPUs: the newest sample of each GPU, from any of its workers.

Workers that share a GPU each report all of it, so its figures are kept once per GPU.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..core.messages import GpuSample
from .catalogue import GPU_COUNTERS, GPU_GAUGES

Labels = tuple[str, ...]
Rows = list[tuple[Labels, float]]
THROTTLES = ("power", "temperature", "hardware")

_DEVICE: Mapping[str, Callable[[GpuSample], float | None]] = {
    "gpu_memory_used_bytes": lambda sample: sample.memory_used_bytes,
    "gpu_memory_total_bytes": lambda sample: sample.memory_total_bytes,
    "gpu_power_watts": lambda sample: sample.power_watts,
    "gpu_power_limit_watts": lambda sample: sample.power_limit_watts,
    "gpu_temperature_celsius": lambda sample: sample.temperature_celsius,
    "gpu_sm_clock_hertz": lambda sample: sample.sm_clock_hertz,
    "gpu_memory_clock_hertz": lambda sample: sample.memory_clock_hertz,
    "gpu_pcie_transmit_bytes_per_second": lambda sample: sample.pcie_sent_bytes_per_s,
    "gpu_pcie_receive_bytes_per_second": lambda sample: sample.pcie_received_bytes_per_s,
    "gpu_nvlink_transmit_bytes_total": lambda sample: sample.nvlink_sent_bytes,
    "gpu_nvlink_receive_bytes_total": lambda sample: sample.nvlink_received_bytes,
}
_WORKER: Mapping[str, Callable[[GpuSample], float | None]] = {
    "gpu_peak_flops_per_second": lambda sample: sample.peak_flops_per_s,
    "gpu_peak_bytes_per_second": lambda sample: sample.peak_bytes_per_s,
}


@dataclass(frozen=True, slots=True)
class _Gpu:
    node: str
    sample: GpuSample

    @property
    def labels(self) -> Labels:
        return self.node, str(self.sample.index), self.sample.uuid


class GpuBoard:
    """Fed with what workers' heartbeats bring."""

    def __init__(self) -> None:
        self._gpus: dict[str, _Gpu] = {}  # by UUID
        self._of_worker: dict[str, str] = {}  # UUIDs by worker

    def add(self, worker_id: str, node: str, sample: GpuSample) -> None:
        self._gpus[sample.uuid] = _Gpu(node, sample)
        self._of_worker[worker_id] = sample.uuid

    def forget(self, worker_id: str) -> None:
        """Forgets a worker whose name another process has taken."""
        self._of_worker.pop(worker_id, None)

    def rows(self, workers: Iterable[tuple[str, str]]) -> dict[str, Rows]:
        """The rows by metric, for the GPUs of the present workers: (pool, worker_id). Figures that a GPU
        does not report are absent."""
        users = [
            (pool, worker_id, self._of_worker[worker_id])
            for pool, worker_id in workers
            if worker_id in self._of_worker
        ]
        gpus = [self._gpus[uuid] for uuid in dict.fromkeys(uuid for *_, uuid in users)]
        rows: dict[str, Rows] = {metric.name: [] for metric in (*GPU_GAUGES, *GPU_COUNTERS)}
        for name, read in _DEVICE.items():
            rows[name] = [(gpu.labels, value) for gpu in gpus if (value := read(gpu.sample)) is not None]
        for gpu in gpus:
            if gpu.sample.throttled_by is not None:
                rows["gpu_throttled"] += [
                    ((*gpu.labels, why), float(why in gpu.sample.throttled_by)) for why in THROTTLES
                ]
        for pool, worker_id, uuid in users:
            gpu = self._gpus[uuid]
            rows["gpu_info"].append(((pool, worker_id, *gpu.labels, gpu.sample.name), 1.0))
            for name, read in _WORKER.items():
                if (value := read(gpu.sample)) is not None:
                    rows[name].append(((pool, worker_id), value))
        return rows
