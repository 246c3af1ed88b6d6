import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.messages import GpuSample
from pdserve.engine.gpu import GpuProbe, probe_devices, probe_memory, probe_node
from pdserve.engine.gpu_peaks import GPU_MODELS, gpu_model, peaks_of

GIB = 1 << 30


def test_a_machine_without_a_driver_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert probe_devices() == ()


def nvml(monkeypatch: pytest.MonkeyPatch, num_gpus: int = 2, **changes: Any) -> list[str]:
    """Installs a driver of H100s that answers every query; returns the calls that open and close it."""
    calls: list[str] = []

    def field(handle: int, asked: list[tuple[int, int]]) -> list[Any]:
        ((number, scope),) = asked
        assert scope == 0xFFFFFFFF, "all links together"
        return [SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(ullVal=number))]

    answers: dict[str, Any] = {
        "nvmlInit": lambda: calls.append("init"),
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlDeviceGetCount": lambda: num_gpus,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid.rpartition("-")[2]),
        "nvmlDeviceGetName": lambda index: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetUUID": lambda index: f"GPU-{index}{index}-{index}",
        "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=80 * GIB, free=79 * GIB, used=GIB),
        "nvmlDeviceGetMigMode": lambda index: [0, 0],
        "nvmlDeviceGetPowerUsage": lambda index: 345_600,
        "nvmlDeviceGetEnforcedPowerLimit": lambda index: 700_000,
        "nvmlDeviceGetTemperature": lambda index, sensor: 61,
        "nvmlDeviceGetClockInfo": lambda index, clock: {
            pynvml.NVML_CLOCK_SM: 1980,
            pynvml.NVML_CLOCK_MEM: 2619,
        }[clock],
        "nvmlDeviceGetPcieThroughput": lambda index, way: {
            pynvml.NVML_PCIE_UTIL_TX_BYTES: 7,
            pynvml.NVML_PCIE_UTIL_RX_BYTES: 8,
        }[way],
        "nvmlDeviceGetFieldValues": field,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda index: (
            pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
        ),
    }
    for name, answer in (answers | changes).items():
        monkeypatch.setattr(pynvml, name, answer)
    return calls


def test_devices_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = nvml(monkeypatch)
    first, second = probe_devices({})
    assert (first.index, first.name, first.total_bytes, first.free_bytes) == (
        0,
        "NVIDIA H100 80GB HBM3",
        80 * GIB,
        79 * GIB,
    )
    assert second.uuid == "GPU-11-1"
    assert calls == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("GPU-11-1", [1]),
        ("GPU-2", [2]),
        ("GPU-", []),
        ("", []),
        ("-1", []),
        ("1,7,0", [1]),
        ("MIG-1234", []),
        ("NoDevFiles", []),
    ],
)
def test_only_gpus_visible_to_cuda_are_listed(
    variable: str, indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(monkeypatch, num_gpus=3)
    assert [device.index for device in probe_devices({"CUDA_VISIBLE_DEVICES": variable})] == indices


def test_a_gpu_that_is_not_usable_as_a_whole_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def memory(index: int) -> SimpleNamespace:
        return SimpleNamespace(total=GIB, free=GIB) if index else unsupported()

    nvml(
        monkeypatch,
        num_gpus=4,
        nvmlDeviceGetMigMode=lambda index: [int(index == 2), 0],
        nvmlDeviceGetMemoryInfo=memory,
    )
    assert [device.index for device in probe_devices({})] == [1, 3]
    assert caplog.messages == ["GPU 0 is left out: Not Supported", "GPU 2 is left out: it is in MIG mode"]
    nvml(monkeypatch, nvmlDeviceGetMigMode=unsupported)
    assert len(probe_devices({})) == 2, "one that knows no MIG"


def unsupported(*_: object) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def sample_of(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> GpuSample:
    calls = nvml(monkeypatch, **changes)
    device = probe_devices({})[1]
    probe = GpuProbe.open(device)
    assert probe is not None
    with probe:
        sample = probe.sample()
    assert calls.count("init") == calls.count("shutdown")
    return sample


def test_a_sample_reports_a_gpus_state_in_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_of(monkeypatch) == GpuSample(
        index=1,
        uuid="GPU-11-1",
        name="NVIDIA H100 80GB HBM3",
        memory_total_bytes=80 * GIB,
        memory_used_bytes=GIB,
        power_watts=345.6,
        power_limit_watts=700.0,
        temperature_celsius=61.0,
        sm_clock_hertz=1.98e9,
        memory_clock_hertz=2.619e9,
        pcie_sent_bytes_per_s=7000.0,
        pcie_received_bytes_per_s=8000.0,
        nvlink_sent_bytes=pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX * 1024,
        nvlink_received_bytes=pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX * 1024,
        throttled_by=("power",),
        peak_flops_per_s=989e12,
        peak_bytes_per_s=3.35e12,
    )


def test_values_that_a_gpu_does_not_report_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "PowerUsage",
        "EnforcedPowerLimit",
        "Temperature",
        "ClockInfo",
        "PcieThroughput",
        "CurrentClocksEventReasons",
    )
    sample = sample_of(
        monkeypatch,
        **{f"nvmlDeviceGet{name}": unsupported for name in asked},
        nvmlDeviceGetFieldValues=lambda *_: [SimpleNamespace(nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED)],
        nvmlDeviceGetName=lambda _: "NVIDIA H999",
    )
    assert sample == GpuSample(
        index=1, uuid="GPU-11-1", name="NVIDIA H999", memory_total_bytes=80 * GIB, memory_used_bytes=GIB
    )


def test_a_gpu_without_a_responding_driver_is_not_monitored(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = nvml(monkeypatch, nvmlDeviceGetHandleByUUID=unsupported)
    device, _ = probe_devices({})
    assert GpuProbe.open(device) is None
    assert calls.count("init") == calls.count("shutdown")
    monkeypatch.setattr(pynvml, "nvmlInit", unsupported)
    assert GpuProbe.open(device) is None


def test_peaks_are_known_by_nvml_name() -> None:
    peaks = peaks_of("NVIDIA A100-SXM4-80GB")
    assert peaks is not None
    assert (peaks.flops_per_s, peaks.bytes_per_s) == (312e12, 2.039e12)
    assert peaks_of("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None


def test_torchs_cuda_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys, pdserve.engine.gpu as gpu; print(gpu.probe_torch_cuda(), 'torch' in sys.modules)"

    def torch_cuda(**environment: str) -> list[str]:
        command = [sys.executable, "-c", code]
        environment = {**os.environ, **environment}
        done = subprocess.run(
            command, check=True, timeout=60, capture_output=True, text=True, env=environment
        )
        return done.stdout.split()

    assert torch_cuda() == [str(torch.version.cuda), "False"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    for text, cuda in [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("debug = False\ncuda = '12.8'", "12.8"),
        ("cuda = None", "None"),
        ("", "None"),
    ]:
        (tmp_path / "torch" / "version.py").write_text(text)
        assert torch_cuda(PYTHONPATH=paths) == [cuda, "False"]


def machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[int, int]:
    """Returns the memory detected on a machine of 16 GiB, 12 of them available, with these files below the
    cgroup root."""
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


def test_gpus_are_found_by_their_short_and_by_their_full_names() -> None:
    assert gpu_model("H200") is gpu_model("h200") is gpu_model("NVIDIA H200") is GPU_MODELS["h200"]
    assert all(peaks_of(model.name) == model.peaks for model in GPU_MODELS.values())


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"gpu: got 'h201', expected one of b200, h200, .*, l4$"):
        gpu_model("h201")
