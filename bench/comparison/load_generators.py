"""`pdserve bench` beside GuideLLM and aiperf: the same load on one server, taking turns, and how far their
tables are apart.

    python -m bench.comparison.load_generators --guidellm ENVIRONMENT --aiperf ENVIRONMENT

ENVIRONMENT is a virtual environment in which nothing but that tool was installed:

    pip install torch==2.13.0 'guidellm==0.8.*'
    pip install 'aiperf==0.13.*'

A figure is the median of a tool's turns, a ratio the median of those of the rounds, theirs over ours, from
the least to the greatest. One worker has the first core; the tools run on the others, which they share with
the router."""

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from itertools import count
from pathlib import Path

import grpc

from bench.comparison.load_tools.slowed import make_slowed
from bench.comparison.load_tools.tools import AiPerf, Figures, GuideLlm, Load, LoadTool, Pdserve, take_turn
from pdserve.cluster.launch import launch
from pdserve.core.config import ClusterConfig
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

_NOT_COMPARED = ("requests", "failed", "cached tokens")


@contextmanager
def served(model: Path) -> Iterator[str]:
    """One worker for both phases, on the first core; the address of its HTTP server."""
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(model)},
            "listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"},
            "pools": {"prefill": {"instances": 0}, "decode": {"kv_cache_bytes": 512 << 20}},
        }
    )
    with launch(config) as cluster:
        with grpc.insecure_channel(cluster.local_address) as channel:
            for status in rpc.ClusterStub(channel).WatchStatus(pb.WatchStatusRequest()):
                if status.workers and all(worker.state == pb.WORKER_STATE_READY for worker in status.workers):
                    break
        yield f"http://{cluster.http_address}"


def take_turns(
    tools: Sequence[LoadTool], load: Load, num_rounds: int, seeds: Iterator[int], scratch: Path
) -> list[dict[str, Figures]]:
    """Returns each tool's figures for each round. The starting tool changes from round to round, and no
    prompt is repeated."""
    rounds = []
    for index in range(num_rounds):
        turned = [*tools[index % len(tools) :], *tools[: index % len(tools)]]
        rounds.append(
            {
                tool.name: take_turn(tool, load, next(seeds), scratch / f"{tool.name}-{index}")
                for tool in turned
            }
        )
    return rounds


def table(rounds: Sequence[dict[str, Figures]], names: Sequence[str]) -> Iterator[str]:
    """`names`: ours first."""
    ours, *theirs = names
    yield (
        f"{'':16}"
        + "".join(f"{name:>12}" for name in names)
        + "".join(f"{f'{name} / {ours}':>32}" for name in theirs)
    )
    for figure in rounds[0][ours]:
        cells = [_median(rounds, name, figure) for name in names]
        line = f"{figure:16}" + "".join(
            f"{'-' if cell is None else format(cell, ',.2f'):>12}" for cell in cells
        )
        if figure not in _NOT_COMPARED:
            line += "".join(f"{_ratio(rounds, name, ours, figure):>32}" for name in theirs)
        yield line.rstrip()


def _median(rounds: Sequence[dict[str, Figures]], name: str, figure: str) -> float | None:
    values = [one[name][figure] for one in rounds if figure in one[name]]
    return statistics.median(values) if values else None


def _ratio(rounds: Sequence[dict[str, Figures]], name: str, ours: str, figure: str) -> str:
    ratios = sorted(one[name][figure] / one[ours][figure] for one in rounds if figure in one[name])
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})" if ratios else "-"


def version(environment: Path, package: str) -> str:
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    answer = subprocess.run(
        [environment / "bin" / "python", "-c", ask], check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def loads_of(args: argparse.Namespace, url: str, model: str) -> dict[str, Load]:
    """Both loads, by the name of their folder."""
    load = Load(url, model, args.requests, args.prompt_tokens, args.output_tokens)
    return {"open": replace(load, rate=args.rate), "closed": replace(load, concurrency=args.concurrency)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guidellm", type=Path, required=True)
    parser.add_argument("--aiperf", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5, help="of the open load, per second")
    parser.add_argument("--concurrency", type=int, default=1, help="of the closed load")
    parser.add_argument(
        "--layers", type=int, default=40, help="of the embedded model, made slower; 5: as it is"
    )
    args = parser.parse_args()
    tools: list[LoadTool] = [Pdserve(), GuideLlm(args.guidellm), AiPerf(args.aiperf)]
    print(
        f"{date.today()}, GuideLLM {version(args.guidellm, 'guidellm')}, aiperf"
        f" {version(args.aiperf, 'aiperf')}"
    )
    print(
        f"{args.layers} layers, {args.prompt_tokens} tokens in, {args.output_tokens} out; medians of"
        f" {args.rounds} rounds"
    )
    seeds = count()
    with tempfile.TemporaryDirectory(prefix="pdserve-judges-") as folder:
        scratch = Path(folder)
        model = make_slowed(scratch / "judged", args.layers)
        with served(model) as url:
            loads = loads_of(args, url, model.name)
            for name, load in loads.items():
                take_turn(tools[0], replace(load, num_requests=8), next(seeds), scratch / "warm-up" / name)
            for name, load in loads.items():
                rounds = take_turns(tools, load, args.rounds, seeds, scratch / name)
                print("", load.words, *table(rounds, [tool.name for tool in tools]), sep="\n")


if __name__ == "__main__":
    main()
