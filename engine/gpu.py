"""What a machine has: GPUs by NVML, cores and memory by the kernel. The only importer of pynvml.

Without an NVIDIA driver there are simply no GPUs; nothing here needs torch.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pynvml

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Node:
    """One machine, as this process may use it: its cores by affinity, its memory within the cgroup's limit."""

    name: str
    cores: tuple[int, ...]
    total_memory_bytes: int
    available_memory_bytes: int
    devices: tuple[DeviceInfo, ...] = ()


def probe_node() -> Node:
    """This machine."""
    total, available = probe_memory()
    return Node(socket.gethostname(), tuple(sorted(os.sched_getaffinity(0))), total, available, probe_devices())


def probe_devices() -> tuple[DeviceInfo, ...]:
    """The GPUs that NVML reports; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_device(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _device(index: int) -> DeviceInfo:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    return DeviceInfo(index, str(name), str(uuid), int(memory.total), int(memory.free))


def probe_memory(proc: Path = PROC, cgroup_root: Path = CGROUP_ROOT) -> tuple[int, int]:
    """Total and available bytes of memory, the lesser of what the machine and each enclosing cgroup grant."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _cgroup_limits(proc, cgroup_root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _cgroup_limits(proc: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every cgroup around this process, of version 1 or 2."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        path = base / group.lstrip("/")
        for folder in (path, *path.parents):
            if folder.is_relative_to(base):
                yield from _cgroup_limit(folder, *names)


def _cgroup_limit(folder: Path, limit_name: str, used_name: str, reclaimable_name: str) -> Iterator[tuple[int, int]]:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # a root without limits, or a path of another namespace
        return
    if limit != "max":
        yield int(limit), used - int(stat.get(reclaimable_name, 0))
