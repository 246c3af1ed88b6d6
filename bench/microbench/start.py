"""The start of `pdserve up` with the defaults, to ready: by the clock, and the CPU time of all its processes.

    python -m bench.microbench.start [--tree FOLDER]... [--turns 5]

With several checkouts (`--tree`), each with its compiled kernels, they take turns."""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.descendants import descendants

UP = "from pdserve.cli.entry import main; main()"
SETS = ("listen.grpc=0", "listen.http=null", "observability.log_format=console")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Start:
    """One start. `cpu_s`: of all processes, and of their children that have ended."""

    wall_s: float
    cpu_s: float
    num_processes: int


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS_PER_S


def start(tree: Path) -> Start:
    """Starts a cluster from `tree`, measures when it is ready, and ends it."""
    options = [word for setting in SETS for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(tree), "PDSERVE_RUNTIME_DIR": f"{folder}/runtime"}
        began_s = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", UP, "up", *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        ) as process:
            assert process.stderr is not None
            if not any(line.startswith("ready:") for line in process.stderr):
                raise SystemExit(f"{tree}: pdserve up does not start")
            pids = [process.pid, *descendants(process.pid)]
            measured = Start(time.monotonic() - began_s, sum(map(cpu_s, pids)), len(pids))
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, action="append", help="a checkout; by default this one")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    trees = [tree.resolve() for tree in arguments.tree or [Path.cwd()]]
    starts: dict[Path, list[Start]] = {tree: [] for tree in trees}
    for _ in range(arguments.turns):
        for tree in trees:
            starts[tree].append(start(tree))
    print(f"median of {arguments.turns} starts, load average {os.getloadavg()[1]:.1f} in the last 5 minutes")
    for tree, measured in starts.items():
        wall_s = statistics.median(one.wall_s for one in measured)
        cpu = statistics.median(one.cpu_s for one in measured)
        print(
            f"{wall_s:6.1f} s to ready, {cpu:6.2f} s of CPU, {measured[-1].num_processes} processes: {tree}"
        )


if __name__ == "__main__":
    main()
