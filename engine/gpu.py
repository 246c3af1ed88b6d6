"""Describes a machine: GPUs by NVML, cores and memory by the kernel. The only importer of pynvml.

Without an NVIDIA driver there are simply no GPUs; nothing here imports torch.
"""

import ast
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pynvml

from ..core.messages import GpuSample
from .gpu_peaks import peaks_of

log = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")
VISIBLE = "CUDA_VISIBLE_DEVICES"  # as CUDA reads it: which GPUs a process has, and in which order
# share of a GPU's memory that its instances may fill; the rest is left to other processes
GPU_MEMORY_FRACTION = 0.9
ALL_LINKS = 0xFFFFFFFF  # NVML's scope for the sum over a GPU's links
THROTTLES = {
    "power": pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "temperature": pynvml.nvmlClocksEventReasonSwThermalSlowdown
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hardware": pynvml.nvmlClocksEventReasonHwSlowdown,
}  # reasons why a GPU runs below its usual clocks

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU."""

    index: int  # NVML's, in the order of the PCI bus
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Node:
    """One machine, as this process may use it: its cores by affinity, its memory within the cgroup's
    limit."""

    name: str
    cores: tuple[int, ...]
    total_memory_bytes: int
    available_memory_bytes: int
    devices: tuple[DeviceInfo, ...] = ()
    torch_cuda: str | None = None  # the CUDA that torch was built for there; None: torch uses no GPU

    @property
    def usable_devices(self) -> tuple[DeviceInfo, ...]:
        return self.devices if self.torch_cuda is not None else ()


def probe_node() -> Node:
    """Returns this machine."""
    total, available = probe_memory()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Node(socket.gethostname(), cores, total, available, probe_devices(), probe_torch_cuda())


def probe_torch_cuda() -> str | None:
    """Returns the CUDA version that torch was built for, read from torch's files: importing it takes a second
    and hundreds of megabytes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    for statement in ast.parse((Path(spec.origin).parent / "version.py").read_text()).body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
            value = getattr(statement, "value", None)
            return str(value.value) if isinstance(value, ast.Constant) and value.value is not None else None
    return None


def probe_devices(environment: Mapping[str, str] = os.environ) -> tuple[DeviceInfo, ...]:
    """Returns the GPUs that NVML reports and that CUDA would make visible to this process, in CUDA's order;
    none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        devices = [
            device for index in range(pynvml.nvmlDeviceGetCount()) if (device := _device(index)) is not None
        ]
    finally:
        pynvml.nvmlShutdown()
    visible = environment.get(VISIBLE)
    return tuple(devices if visible is None else _visible(devices, visible))


def _visible(devices: Sequence[DeviceInfo], names: str) -> Iterator[DeviceInfo]:
    """Interprets the variable like CUDA: indices or prefixes of UUIDs, up to the first that matches
    nothing."""
    for name in map(str.strip, names.split(",")):
        found = [
            one
            for one in devices
            if name == str(one.index) or (name.startswith("GPU-") and one.uuid.startswith(name))
        ]
        if len(found) != 1:
            return
        yield found[0]


def _device(index: int) -> DeviceInfo | None:
    """Returns None for a GPU that is broken, has no memory of its own, or is divided into MIG instances."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        log.warning("GPU %d is left out: %s", index, error)
        return None
    if _if_reported(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0]):
        log.warning("GPU %d is left out: it is in MIG mode", index)
        return None
    return DeviceInfo(index, str(name), str(uuid), int(memory.total), int(memory.free))


class GpuProbe:
    """Samples the state of one GPU; a context manager, used by one thread."""

    def __init__(self, device: DeviceInfo, handle: object) -> None:
        self._device = device
        self._handle = handle
        self._peaks = peaks_of(device.name)

    @classmethod
    def open(cls, device: DeviceInfo) -> "GpuProbe | None":
        """Returns None when the driver does not answer."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            return cls(device, pynvml.nvmlDeviceGetHandleByUUID(device.uuid))
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            return None

    def sample(self) -> GpuSample:
        """Values that the GPU does not report are None."""
        device, handle, peaks = self._device, self._handle, self._peaks
        memory = _if_reported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
        return GpuSample(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            memory_total_bytes=device.total_bytes,
            memory_used_bytes=None if memory is None else int(memory.used),
            power_watts=_if_reported(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            power_limit_watts=_if_reported(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
            temperature_celsius=_if_reported(
                lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            ),
            sm_clock_hertz=_if_reported(
                lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6
            ),
            memory_clock_hertz=_if_reported(
                lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6
            ),
            pcie_sent_bytes_per_s=_if_reported(
                lambda: _pcie_bytes_per_s(handle, pynvml.NVML_PCIE_UTIL_TX_BYTES)
            ),
            pcie_received_bytes_per_s=_if_reported(
                lambda: _pcie_bytes_per_s(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES)
            ),
            nvlink_sent_bytes=_if_reported(
                lambda: _link_bytes(handle, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX)
            ),
            nvlink_received_bytes=_if_reported(
                lambda: _link_bytes(handle, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
            ),
            throttled_by=_if_reported(
                lambda: _throttles(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
            ),
            peak_flops_per_s=None if peaks is None else peaks.flops_per_s,
            peak_bytes_per_s=None if peaks is None else peaks.bytes_per_s,
        )

    def __enter__(self) -> "GpuProbe":
        return self

    def __exit__(self, *_: object) -> None:
        pynvml.nvmlShutdown()


def _if_reported(ask: Callable[[], T]) -> T | None:
    """Returns the answer, or None where this GPU or this driver has none."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _pcie_bytes_per_s(handle: object, direction: int) -> float:
    """Returns PCIe throughput; NVML measures for 20 ms and answers in units of 1000 bytes."""
    return float(pynvml.nvmlDeviceGetPcieThroughput(handle, direction)) * 1e3


def _link_bytes(handle: object, field: int) -> int:
    """Returns a counter of KiB, over all NVLinks, since the driver was loaded."""
    (answer,) = pynvml.nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS)])
    if answer.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(answer.nvmlReturn)
    return int(answer.value.ullVal) << 10


def _throttles(reasons: int) -> tuple[str, ...]:
    return tuple(name for name, bits in THROTTLES.items() if reasons & bits)


def probe_memory(proc: Path = PROC, cgroup_root: Path = CGROUP_ROOT) -> tuple[int, int]:
    """Returns total and available bytes of memory, the lesser of the limits that the machine and each
    enclosing cgroup grant."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _cgroup_limits(proc, cgroup_root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _cgroup_limits(proc: Path, root: Path) -> Iterator[tuple[int, int]]:
    """Returns (limit, bytes in use that cannot be reclaimed) of every cgroup around this process, of version
    1 or 2."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = (
                root / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        path = base / group.lstrip("/")
        for folder in (path, *path.parents):
            if folder.is_relative_to(base):
                yield from _cgroup_limit(folder, *names)


def _cgroup_limit(
    folder: Path, limit_name: str, used_name: str, reclaimable_name: str
) -> Iterator[tuple[int, int]]:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # a root without limits, or a path of another namespace
        return
    if limit != "max":
        yield int(limit), used - int(stat.get(reclaimable_name, 0))
