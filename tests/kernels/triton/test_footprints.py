"""The compile gate: every kernel compiles for each of its target GPUs, and none spills registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.kernels.triton.footprint import source_digest

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "kernels" / "triton"
TABLE = Path(__file__).with_name("footprints.txt")
MAKE = f"python -m bench.microbench.kernel_footprints > {TABLE.relative_to(ROOT)}"


def kernels(table: str) -> set[str]:
    return {line.split()[0] for line in table.splitlines()[2:-1]}


def launched() -> set[str]:
    sources = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    return set(re.findall(r"Launch\(\s*_(\w+),", sources))


def test_the_table_of_all_targets_is_of_these_sources_and_nothing_spills() -> None:
    table = TABLE.read_text()
    assert table.startswith(f"sources {source_digest()};"), f"the kernels have changed: {MAKE}"
    assert table.endswith(" compiled, 0 spill\n")
    assert kernels(table) == launched()


@pytest.mark.timeout(1200)  # it computes for some ten seconds on two quiet cores
def test_the_first_case_of_every_kernel_compiles_without_spilling() -> None:
    # In a process of its own: in this one the kernels are the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    gate = "bench.microbench.kernel_footprints"
    command = [sys.executable, "-m", gate, "--jobs", "2", "--first-cases-for", "90"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert kernels(ran.stdout) == launched()
