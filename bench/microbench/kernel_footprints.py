"""Compiles every Triton kernel for every GPU it is made for, as production launches it, and prints what each
takes of a multiprocessor. Needs no GPU. Fails where a kernel spills registers to memory.

`python -m bench.microbench.kernel_footprints --jobs 2 [--first-cases-for 90]`

What it prints for all targets stands in `tests/kernels/triton/footprints.txt`, with a digest of the sources:
a change of these is compiled for all of them once, and not by each run of the tests.
"""

import argparse
import multiprocessing
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as ever; 3.9 warns that a later version will not

import triton

from pdserve.kernels.triton.footprint import Footprint, footprint, source_digest
from pdserve.kernels.triton.production import TARGETS, production_launches

_KERNEL, _CASE = 24, 44


def _compile(where: tuple[int, int]) -> tuple[int, str, Footprint]:
    """The launch is made anew, as kernels do not travel between processes."""
    target, index = where
    case, launch = list(production_launches(target))[index]
    return target, case, footprint(launch, target)


def _cases(target: int, *, is_short: bool) -> list[int]:
    """Returns the indices of the launches to compile: of a short table the first of each kernel."""
    kernels = [launch.kernel.__name__ for _, launch in production_launches(target)]
    return [index for index, name in enumerate(kernels) if not is_short or kernels.index(name) == index]


def _line(case: str, by_target: dict[int, Footprint]) -> str:
    first = next(iter(by_target.values()))
    cells = "  ".join(_cells(by_target[target]) if target in by_target else " " * 18 for target in TARGETS)
    return f"{first.kernel:<{_KERNEL}} {case:<{_CASE}} {first.num_warps:>5}  {cells}"


def _cells(taken: Footprint) -> str:
    return f"{taken.registers:>4} {taken.spill_bytes:>5} {taken.shared_bytes:>7}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument(
        "--first-cases-for",
        type=int,
        choices=TARGETS,
        help="only the first case of each kernel, for one target",
    )
    arguments = parser.parse_args()
    only = arguments.first_cases_for
    targets = TARGETS if only is None else (only,)
    wanted = [(target, index) for target in targets for index in _cases(target, is_short=only is not None)]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        compiled = pool.map(_compile, wanted, chunksize=1)
    table: dict[tuple[str, str], dict[int, Footprint]] = {}
    for target, case, taken in compiled:
        table.setdefault((taken.kernel, case), {})[target] = taken
    print(
        f"sources {source_digest()}; Triton {triton.__version__}; per target: registers of a thread, bytes"
        " spilled, bytes of shared memory of a block"
    )
    print(
        f"{'kernel':<{_KERNEL}} {'case':<{_CASE}} warps  "
        + "  ".join(f"{f'sm_{target}':>18}" for target in TARGETS)
    )
    for (_, case), by_target in table.items():
        print(_line(case, by_target))
    spilling = [(target, case, taken) for target, case, taken in compiled if taken.spill_bytes]
    for target, case, taken in spilling:
        print(f"spills: {taken.kernel}, {case}, sm_{target}: {taken.spill_bytes} bytes", file=sys.stderr)
    print(f"{len(compiled)} compiled, {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
