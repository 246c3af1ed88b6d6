"""Is it right on this GPU, and how near is it to what the GPU does at most?

    python bench/gpu                        everything, under nine minutes on an H100 or H200
    python bench/gpu --only limits attention
    python bench/gpu --interpret            correctness alone, at toy sizes in Triton's interpreter; needs no GPU
    python bench/gpu --save [FOLDER]        also writes DATE-gpu.txt, into bench/results by default

First it compares every Triton kernel with its torch reference and an engine with `transformers`; then it measures this GPU's
limits, and how near attention, decode steps, prefill, serving and KV transfer come to them, beside peers in the same run.
Exits with status 1 if anything was not correct; a missed target is only told. Needs torch, triton, transformers, numpy,
safetensors, msgspec and nvidia-ml-py; not Ray, not gRPC.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu.report import Message, Note, is_correct, line_of, summary
from gpu.sections import CORRECTNESS, SECTIONS, limits_of, run_apart, serve

_FOLDER = Path(__file__).resolve().parent
_MOST_S = 530.0  # in all
_LEAST_S = 1.0
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python")


def run(names: list[str], *, interpret: bool) -> list[Message]:
    """All messages of the sections, in the order of `SECTIONS`; each is printed when it comes.

    Most sections take less than they may; where they do not, it is the last ones that are cut short.
    """
    messages: list[Message] = []
    ends_s = time.monotonic() + _MOST_S
    for section in (section for section in SECTIONS if section.name in names):
        started_s = time.monotonic()
        print(f"--- {section.name}", flush=True)
        limited = replace(section, budget_s=max(min(section.budget_s, ends_s - started_s), _LEAST_S))
        for message in run_apart(limited, _FOLDER, interpret=interpret, limits=limits_of(messages)):
            messages.append(message)
            print(line_of(message), flush=True)
        print(f"    {time.monotonic() - started_s:.0f} s", flush=True)
    return messages


def versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def save(text: str, folder: Path) -> Path:
    path = folder / f"{date.today()}-gpu.txt"
    command = f"python bench/gpu {' '.join(sys.argv[1:])}".rstrip()
    path.write_text(f"{command}\n{date.today()}, {versions()}\n\n{text}\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="correctness alone, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], help="these sections alone")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=_FOLDER.parent / "results", metavar="FOLDER", help="write the table"
    )
    parser.add_argument("--section", choices=[section.name for section in SECTIONS], help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, default=_MOST_S, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section is not None:
        section = next(section for section in SECTIONS if section.name == args.section)
        serve(replace(section, budget_s=args.budget_s), interpret=args.interpret, limits=args.limits)
    names = args.only or (CORRECTNESS if args.interpret else [section.name for section in SECTIONS])
    if not set(names) <= set(CORRECTNESS):
        names = ["limits", *names]  # what is measured is measured by them
    if args.interpret and not set(names) <= set(CORRECTNESS):
        parser.error(f"--interpret runs {' and '.join(CORRECTNESS)} alone")
    started_s = time.monotonic()
    messages = [Note(versions()), *run(list(names), interpret=args.interpret)]
    text = f"{summary(messages)}\n\n{time.monotonic() - started_s:.0f} s in all"
    print(f"\n{text}", flush=True)
    if args.save is not None:
        print(f"written to {save(text, args.save)}")
    return 0 if is_correct(messages, CORRECTNESS) else 1


if __name__ == "__main__":
    sys.exit(main())
