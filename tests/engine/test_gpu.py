import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pdserve.engine.gpu import probe_devices, probe_memory, probe_node

GIB = 1 << 30


def test_a_machine_without_a_driver_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert probe_devices() == ()


def test_devices_are_told_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda index: f"GPU {index}",
        "nvmlDeviceGetUUID": lambda index: f"uuid-{index}",
        "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=80 * GIB, free=79 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    first, second = probe_devices()
    assert (first.index, first.name, first.total_bytes, first.free_bytes) == (0, "GPU 0", 80 * GIB, 79 * GIB)
    assert second.uuid == "uuid-1"
    assert calls == ["shutdown"]


def machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[int, int]:
    """What is probed on a machine of 16 GiB, 12 of them available, with these files below the cgroup root."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {12 << 20} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return probe_memory(proc, root)


def v2(folder: str, limit: int | str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def test_memory_without_cgroup_limits_is_the_machines(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", {}) == (16 * GIB, 12 * GIB)


def test_a_cgroup_limits_memory(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/a/b\n", v2("a/b", 8 * GIB, 3 * GIB, inactive=GIB)) == (8 * GIB, 6 * GIB)


def test_an_outer_cgroup_limits_memory_too(tmp_path: Path) -> None:
    files = v2("a/b", "max", 0) | v2("a", 4 * GIB, 5 * GIB)
    assert machine(tmp_path, "0::/a/b\n", files) == (4 * GIB, 0)


def test_a_container_sees_its_limit_at_the_root(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/../outside\n", v2(".", 2 * GIB, GIB)) == (2 * GIB, GIB)


def test_cgroups_of_version_one_are_read(tmp_path: Path) -> None:
    files = {
        "memory/x/memory.limit_in_bytes": str(3 * GIB),
        "memory/x/memory.usage_in_bytes": str(2 * GIB),
        "memory/x/memory.stat": f"total_inactive_file {GIB}\n",
    }
    assert machine(tmp_path, "4:memory:/x\n3:cpuset:/\n", files) == (3 * GIB, 2 * GIB)


def test_this_machine_has_cores_and_memory() -> None:
    node = probe_node()
    assert set(node.cores) == os.sched_getaffinity(0)
    assert 0 < node.available_memory_bytes <= node.total_memory_bytes
