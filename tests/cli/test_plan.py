"""The output of `plan` and `validate` about GPUs."""

import json
from pathlib import Path

import pytest

from pdserve.engine.gpu import DeviceInfo, Node
from pdserve.planner import plan as plan_module
from tests.cli.conftest import Run

GPU = DeviceInfo(0, "NVIDIA H100 80GB HBM3", "GPU-0", 80 << 30, 79 << 30)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def test_plan_shows_the_gpus_and_their_instances(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        plan_module, "probe_node", lambda: Node("here", (0, 1), 1 << 30, 1 << 30, (GPU,), "13.0")
    )
    half = "{gpus_per_instance: 0.5}"
    file.write_text(f"metadata: {{pdserve: {{pools: {{prefill: {half}, decode: {half}}}}}}}\n")
    planned = run("plan", str(file))
    assert (planned.exit_code, planned.stderr) == (0, "")
    lines = planned.stdout.splitlines()
    assert "device    cuda (1 GPU found)" in lines
    assert (
        "GPU 0     NVIDIA H100 80GB HBM3 of here: 80 GiB, 79 GiB free now; planned: 1 prefill and 1 decode,"
        " 72 GiB" in lines
    )
    assert "decode: 1 instance of 0.5 GPU and 1 core, 1 thread" in lines
    as_json = json.loads(run("plan", str(file), "-o", "json").stdout)
    assert as_json["gpus"][0]["instances"] == ["prefill", "decode"]
    assert [pool["gpu_share"] for pool in as_json["pools"]] == [0.5, 0.5]


def test_a_missing_gpu_is_not_a_configuration_error(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "probe_node", lambda: Node("here", (0, 1), 1 << 30, 1 << 30))
    file.write_text("metadata: {pdserve: {device: cuda}}\n")
    result = run("validate", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: valid\n")
    assert result.stderr.startswith(
        f"on this machine: {file}:1: metadata.pdserve.device: got cuda, but no GPU was found; expected "
    )
    assert run("plan", str(file)).exit_code == 1


def test_kernels_that_no_gpu_has_are_a_mistake_in_the_file(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        plan_module, "probe_node", lambda: Node("here", (0, 1), 1 << 30, 1 << 30, (GPU,), "13.0")
    )
    file.write_text("metadata: {pdserve: {device: cuda, kernels: native}}\n")
    result = run("validate", str(file))
    assert result.exit_code == 1
    assert "kernels: got native, expected one of auto, triton on device cuda" in result.stderr
