"""The wheel is whole: it works outside the checkout, with native kernels, generated protobuf code and the
embedded model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import pdserve, torch
from pathlib import Path
assert Path(pdserve.__file__).is_relative_to(Path.cwd()), pdserve.__file__
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.checkpoint import resolve_model_path
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.proto import pdserve_pb2, pdserve_pb2_grpc
path = resolve_model_path("embedded")
assert path.is_relative_to(Path.cwd()), path
engine = Engine.open(path, EngineOptions(num_blocks=128))
print("kernels:", engine.kernels.name)
print("tokens:", len(Tokenizer.load(path).encode("The with statement")))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip would install it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("pdserve-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_works_outside_the_checkout(unpacked: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", USE], cwd=unpacked, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "tokens:" in result.stdout


def test_the_wheel_holds_the_package_and_nothing_else(unpacked: Path) -> None:
    top = {path.name for path in unpacked.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pdserve"}
    rooms = {path.name for path in (unpacked / "pdserve").iterdir() if path.is_dir()}
    assert rooms == {
        "cli",
        "cluster",
        "core",
        "decode_worker",
        "embedded",
        "engine",
        "gateway",
        "grammar",
        "head",
        "kernels",
        "kv_transfer",
        "loadgen",
        "planner",
        "prefill_worker",
        "proto",
        "router",
        "simulator",
        "telemetry",
        "worker",
    }
