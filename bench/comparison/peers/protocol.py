"""The measurement protocol of every engine, ours included: the same prompts, a warm-up run, then repeats read
off one clock.

An engine only says when each token arrived; the rates are computed here, so no engine's own accounting
enters. A peer's program writes one JSON line when its model is loaded, and one (a list of results) for each
case that it reads; it ends at the end of its input."""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from .schema import Case, CellResult


@dataclass(frozen=True)
class RunTimes:
    """The instants of one run, on `time.perf_counter`."""

    start_s: float
    arrivals_s: tuple[tuple[float, ...], ...]  # [batch_size][num_new_tokens]


class MeasuredEngine(Protocol):
    """An engine with a loaded model."""

    @property
    def variant(self) -> str: ...

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> RunTimes:
        """Continue all prompts together, greedily, past any end-of-sequence token, and with no prefix cached
        before."""
        ...


def make_prompts(case: Case, vocab_size: int) -> list[list[int]]:
    rng = random.Random(case.name)
    return [
        [rng.randrange(vocab_size) for _ in range(case.num_prompt_tokens)] for _ in range(case.batch_size)
    ]


def tokens_per_s(case: Case, timeline: RunTimes) -> float:
    """Prefill: prompt tokens over the time to the first token. Decode: the rate while the whole batch is
    decoding, from the moment the last sequence has its first token to the moment the first sequence has its
    last."""
    arrivals = timeline.arrivals_s
    if len(arrivals) != case.batch_size or any(len(times) != case.num_new_tokens for times in arrivals):
        counts = sorted({len(times) for times in arrivals})
        expected = f"{case.batch_size} sequences of {case.num_new_tokens} tokens"
        raise ValueError(
            f"{case.name}: expected {expected}, got {len(arrivals)} sequences of {counts} tokens"
        )
    opened_s = max(times[0] for times in arrivals)
    if case.phase == "prefill":
        return case.batch_size * case.num_prompt_tokens / (opened_s - timeline.start_s)
    closed_s = min(times[-1] for times in arrivals)
    if closed_s <= opened_s:
        raise ValueError(f"{case.name}: the batch was never decoding as a whole; it needs more new tokens")
    num_tokens = sum(opened_s < time_s <= closed_s for times in arrivals for time_s in times)
    return num_tokens / (closed_s - opened_s)


def measure(
    engine: MeasuredEngine, case: Case, vocab_size: int, num_repeats: int, warm_up: bool
) -> tuple[float, ...]:
    """The tokens/s of each repeat."""
    prompts = make_prompts(case, vocab_size)
    if warm_up:
        engine.run(prompts, case.num_new_tokens)
    return tuple(tokens_per_s(case, engine.run(prompts, case.num_new_tokens)) for _ in range(num_repeats))


@dataclass(frozen=True)
class PeerOptions:
    checkpoint: Path
    shape: str
    dtype: str
    num_threads: int
    num_repeats: int
    cases: tuple[Case, ...] | None  # None: they come as lines on standard input
    kernels: str = "auto"  # of pdserve alone

    @property
    def vocab_size(self) -> int:
        config = json.loads((self.checkpoint / "config.json").read_text())
        return int(config["vocab_size"])


def parse_options(argv: Sequence[str] | None = None) -> PeerOptions:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--shape", help="the shape's name in the results; by default the checkpoint folder's name"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", default="auto", help="the kind of kernel, for pdserve alone")
    parser.add_argument(
        "--cases", help="a JSON list of cases; by default one case per line is read from standard input"
    )
    args = parser.parse_args(argv)
    return PeerOptions(
        checkpoint=args.checkpoint.resolve(),
        shape=args.shape or args.checkpoint.resolve().name,
        dtype=args.dtype,
        num_threads=args.threads,
        num_repeats=args.repeats,
        kernels=args.kernels,
        cases=None if args.cases is None else tuple(Case(**case) for case in json.loads(args.cases)),
    )


def claim_stdout() -> TextIO:
    """A handle on standard output for the results alone; what libraries print goes to standard error from now
    on."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return results


def serve(name: str, engines: Sequence[MeasuredEngine], options: PeerOptions, results: TextIO) -> None:
    """Say with an empty answer that the model is loaded, then answer each case with one line, until there are
    no more. The first sight of a case warms up."""
    print("[]", file=results, flush=True)
    lines = (Case(**json.loads(line)) for line in sys.stdin)
    cases: Iterable[Case] = lines if options.cases is None else options.cases
    seen: set[Case] = set()
    for case in cases:
        answer = [_measure_cell(name, engine, case, options, warm_up=case not in seen) for engine in engines]
        seen.add(case)
        print(json.dumps([result.to_json() for result in answer]), file=results, flush=True)


def _measure_cell(
    name: str, engine: MeasuredEngine, case: Case, options: PeerOptions, *, warm_up: bool
) -> CellResult:
    repeats = measure(engine, case, options.vocab_size, options.num_repeats, warm_up)
    return CellResult(
        engine=name,
        variant=engine.variant,
        shape=options.shape,
        dtype=options.dtype,
        num_threads=options.num_threads,
        case=case.name,
        repeats_tokens_per_s=repeats,
    )
