"""This tree beside an earlier revision of itself, in one run: what a client sees at batch 1, taking turns.

    python -m bench.comparison.against REVISION [--rounds 5]

Each turn is one run of that tree's own `overhead.py`. A figure is the median of a tree's turns, a ratio the
median of those of the rounds, which stand beside it from the least to the greatest. The earlier tree is
checked out beside this one for the time of the run, and its kernels are built. Workers of both trees run at
the same priority, whatever each asks of Ray."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of `revision`, with its kernels."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=HERE, check=True
        )
        try:
            subprocess.run(
                [sys.executable, "kernels/build.py"], cwd=tree, check=True, stdout=subprocess.DEVNULL
            )
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=HERE, check=True)


def turn(tree: Path, num_requests: int) -> dict[str, float]:
    """Medians of one run: TTFT and ITL through the cluster, in ms."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "RAY_worker_niceness": "0"}
    is_package = (tree / "bench" / "microbench").is_dir()  # earlier revisions had scripts instead
    script = ["-m", "bench.microbench.overhead"] if is_package else ["bench/overhead.py"]
    command = [sys.executable, *script, "--requests", str(num_requests)]
    output = subprocess.run(
        command, cwd=tree, env=environment, check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: float(row[2]) for row in rows if row and row[0] in ("TTFT", "ITL")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40)
    args = parser.parse_args()
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    with checked_out(args.revision) as earlier:
        for _ in range(args.rounds):
            for name, tree in (("earlier", earlier), ("this", HERE)):
                for figure, milliseconds in turn(tree, args.requests).items():
                    figures[figure, name].append(milliseconds)
    print(
        f"{'ms at batch 1':14} {args.revision[:12]:>12} {'this tree':>12} {'ratio':>8}   (medians of"
        f" {args.rounds} turns)"
    )
    for figure in ("TTFT", "ITL"):
        before, after = figures[figure, "earlier"], figures[figure, "this"]
        ratios = sorted(new / old for old, new in zip(before, after, strict=True))
        medians = (
            f"{statistics.median(before):12.3f} {statistics.median(after):12.3f}"
            f" {statistics.median(ratios):8.3f}"
        )
        print(f"{figure:14} {medians}   {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
