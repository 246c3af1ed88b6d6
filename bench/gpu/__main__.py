"""Is it right on this GPU, and how near is it to what the GPU does at most?

    python -m bench.gpu                        everything, under nine minutes on an H100 or H200
    python -m bench.gpu --only attention limits        these sections, in this order
    python -m bench.gpu --only sweep profile   why a target is missed: parameters, and a step's time
    python -m bench.gpu --only kernels --case TEXT   checks with TEXT in their name; --patient: no budgets
    python -m bench.gpu --interpret            correctness at toy sizes, without a GPU
    python -m bench.gpu --save [FOLDER]        keeps DATE-gpu.txt and DATE-gpu-stderr/

First it compares every Triton kernel with its torch reference and an engine with `transformers`, side by
side; then it measures this GPU's limits, and how near attention, KV transfer, decode steps, prefill and
serving come to them, beside peers in the same run. Exits with status 1 if anything was not correct; a missed
target is only reported. Needs torch, triton, transformers, numpy, safetensors, msgspec and nvidia-ml-py; not
Ray, not gRPC."""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path

from bench.gpu.apart import Program, run_side_by_side
from bench.gpu.record import Record, versions
from bench.gpu.report import Begun, Broken, Message, Note, is_correct, line_of
from bench.gpu.sections import BY_NAME, CORRECTNESS, SECTIONS, Context, Section, limits_of, serve

_FOLDER = Path(__file__).resolve().parent
_TOTAL_S = 530.0
_LEAST_S = 5.0  # a section that has less is not begun


def run(sections: Sequence[Section], program: Program, record: Record, total_s: float) -> list[Message]:
    """Runs the sections and returns all messages; each is printed when it arrives.

    Most sections take less than they may; where they do not, it is the last ones that are cut short.
    """
    started_s = time.monotonic()
    messages: list[Message] = [Note(versions())]

    def add(message: Message) -> None:
        messages.append(message)
        print(line_of(message), flush=True)

    for group in parts(sections):
        begins_s = time.monotonic()
        names = ", ".join(section.name for section in group)
        print(f"--- {names}", flush=True)
        limited = within(group, started_s + total_s - begins_s)
        if limited:
            with_limits = replace(program, limits=limits_of(messages))
            for message in run_side_by_side(limited, with_limits, record.stderr_folder):
                add(message)
        for section in group if not limited else ():
            add(Broken(section.name, f"not begun: {total_s:g} s in all were over"))
        print(f"    {time.monotonic() - begins_s:.0f} s", flush=True)
        record.write(messages, f"{time.monotonic() - started_s:.0f} s up to {names}")
    return messages


def parts(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Neighbouring correctness sections run side by side: they are not timed, and wait for the processor,
    which compiles."""
    for key, group in groupby(sections, key=lambda section: section.is_correctness or section.name):
        del key
        yield list(group)


def within(sections: Sequence[Section], left_s: float) -> list[Section]:
    """The sections with budgets that end with the run; none where that is too soon."""
    if left_s < _LEAST_S:
        return []
    return [replace(section, budget_s=min(section.budget_s, left_s)) for section in sections]


def chosen(only: Sequence[str] | None, *, interpret: bool = False, is_patient: bool = False) -> list[Section]:
    """Measurements are relative to the limits, so the limits come first."""
    if interpret:
        names = list(only or CORRECTNESS)
    else:
        names = list(only or (section.name for section in SECTIONS if not section.is_on_request))
        first_measured = next((index for index, name in enumerate(names) if name not in CORRECTNESS), None)
        if first_measured is not None and "limits" not in names:
            names.insert(first_measured, "limits")
    sections = [BY_NAME[name] for name in dict.fromkeys(names)]
    return [replace(section, budget_s=inf) for section in sections] if interpret or is_patient else sections


def main() -> int:
    args = _arguments()
    if args.section is not None:
        section = replace(BY_NAME[args.section], budget_s=args.budget_s)
        serve(section, partial(_context, args))
    sections = chosen(args.only, interpret=args.interpret, is_patient=args.patient)
    arguments = [*(["--no-peers"] if args.no_peers else []), "--case", args.case]
    program = Program(_FOLDER, arguments, args.interpret)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        record = Record(args.save or Path(folder), f"python -m bench.gpu {shlex.join(sys.argv[1:])}".rstrip())
        messages = run(sections, program, record, args.total_s)
        text = record.write(messages, f"{time.monotonic() - started_s:.0f} s in all")
        print(f"\n{text}", flush=True)
        if args.save is not None:
            print(f"written to {record.table}")
    return 0 if is_correct(messages, CORRECTNESS) else 1


def _context(args: argparse.Namespace, emit: Callable[[Message | Begun], None]) -> Context:
    """The context of a section's process."""
    return Context(
        emit,
        interpret=args.interpret,
        limits=args.limits,
        ends_s=time.monotonic() + args.budget_s,
        has_peers=not args.no_peers,
        first_check=args.first_check,
        only_check=args.case,
    )


def _arguments() -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="at toy sizes, in Triton's interpreter")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}, in this order"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only the checks with TEXT in their name")
    parser.add_argument(
        "--patient", action="store_true", help="budgets do not count: for a sanitizer, or a debugger"
    )
    parser.add_argument("--no-peers", action="store_true", help="nothing but ours is measured")
    parser.add_argument(
        "--total-s", type=float, default=_TOTAL_S, help=f"for all of it; {_TOTAL_S:g} by default"
    )
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=_FOLDER.parent / "results",
        metavar="FOLDER",
        help="keep table and stderr",
    )
    parser.add_argument("--section", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, default=_TOTAL_S, help=argparse.SUPPRESS)
    parser.add_argument("--first-check", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.total_s <= 0:
        parser.error(f"--total-s: {args.total_s:g} is not valid, expected a positive number of seconds")
    toys = [section.name for section in SECTIONS if section.has_toy_sizes]
    if args.interpret and not set(args.only or ()) <= set(toys):
        parser.error(f"--interpret: got {' '.join(args.only)}, expected some of {' '.join(toys)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
