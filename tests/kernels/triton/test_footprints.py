"""The compile gate: every kernel compiles for each of its target GPUs, and none spills registers; all of its
cases for Hopper, and by `python -m bench.microbench.kernel_footprints` for all targets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(1200)  # it computes for a minute on two quiet cores
def test_every_kernel_compiles_for_every_target_without_spilling() -> None:
    # In a process of its own: in this one the kernels are the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.microbench.kernel_footprints",
        "--jobs",
        "2",
        "--all-cases-for",
        "90",
    ]
    gate = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert gate.returncode == 0, gate.stdout + gate.stderr
    sources = "".join(path.read_text() for path in (ROOT / "kernels" / "triton").glob("*.py"))
    launched = set(re.findall(r"Launch\(\s*_(\w+),", sources))
    assert launched == {line.split()[0] for line in gate.stdout.splitlines()[2:-1]}
