"""Ctrl-C at any moment of a cluster's start: status 130, one line, and nothing is left."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import await_end

NUM_INTERRUPTS = int(os.environ.get("PDSERVE_NUM_INTERRUPTS", "3"))  # 50 take some minutes
MAX_DELAY_S = float(os.environ.get("PDSERVE_MAX_INTERRUPT_DELAY_S", "8"))  # about as long as a start takes
MARK = "PDSERVE_INTERRUPT_TEST"  # in the environment of all processes of one start
UP = """
import signal, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
make = tempfile.mkdtemp
def recorded(*args, **options):
    print(folder := make(*args, **options), flush=True)
    return folder
tempfile.mkdtemp = recorded
from pdserve.cli.entry import main
print("begun", flush=True)
main()
"""


def processes_of(mark: str) -> list[int]:
    """Returns the processes that a start has left."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", range(NUM_INTERRUPTS))
def test_an_interrupt_while_a_cluster_starts_leaves_nothing(number: int, tmp_path: Path) -> None:
    runtime, mark = tmp_path / "runtime", f"{os.getpid()}-{number}"
    environment = os.environ | {MARK: mark, "PYTHONPATH": os.getcwd(), "PDSERVE_RUNTIME_DIR": str(runtime)}
    environment.pop("RAY_ADDRESS", None)
    sets = [
        "--set",
        "listen.grpc=0",
        "--set",
        "listen.http=null",
        "--set",
        "observability.log_format=console",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", UP, "up", *sets],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            process.wait(random.Random(number).uniform(0.0, MAX_DELAY_S))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        made, errors = process.communicate()
    was_ready = any(line.startswith("ready:") for line in errors.splitlines())
    expected = (0, "stopped") if was_ready else (130, "interrupted")
    assert (process.returncode, errors.splitlines()[-1]) == expected, errors
    assert "Traceback" not in errors
    for pid in processes_of(mark):
        await_end(pid)
    assert not [folder for folder in made.split() if Path(folder).exists()]
    assert not list(runtime.glob("*"))
