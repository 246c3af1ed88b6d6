"""One prefill and one decode worker beside two workers that do both, on the same two cores, at one load after
the other.

    python -m bench.comparison.disaggregation   the sweep of docs/performance.md, ten minutes on 2 cores
    python -m bench.comparison.disaggregation --case even --rates 1,2 --rounds 2 --round-s 10

A core a worker, random weights of a 110M Llama shape. One cluster serves both ways: before each turn its
pools are applied anew (`prefill: 1, decode: 1`, or `prefill: 0, decode: 2`, whose workers then serve both
phases), which flips a worker's role and loads nothing. So both ways have the same processes, cores and
settings, `max_batch_tokens` among them, and their turns are seconds apart. Each round has the same arrivals
and lengths for both. The generator, the router and Ray share the two cores with the workers.

Writes DATE-disaggregation.{json,txt,png} into bench/results with --save.
"""

import argparse
import asyncio
import json
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bench.comparison.disaggregating.outcome import Point, draw, table
from bench.models import LLAMA_110M, ensure_checkpoint
from pdserve.cluster.launch import launch
from pdserve.core.config import ClusterConfig
from pdserve.loadgen.arrivals import Poisson
from pdserve.loadgen.campaign import CampaignPlan, Contender, ratios_of, run_campaign
from pdserve.loadgen.grpc_target import GrpcTarget
from pdserve.loadgen.lengths import parse_lengths
from pdserve.loadgen.slo import Slo, parse_slo
from pdserve.loadgen.workload import Drawn
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

WAYS = {"1P1D": {"prefill": 1, "decode": 1}, "2 colocated": {"prefill": 0, "decode": 2}}
READY = pb.WORKER_STATE_READY


@dataclass(frozen=True)
class Case:
    """A kind of traffic, and the rates at which it is offered."""

    name: str
    prompt_tokens: str
    output_tokens: str
    rates: tuple[float, ...]


EVEN = Case(  # prefill and decode take about as much time of a core
    "even",
    "lognormal:mean=320,cv=0.5,min=32,max=1024",
    "lognormal:mean=128,cv=0.5,min=16,max=384",
    (1.0, 2.5, 4.0, 5.0),
)
PREFILL_HEAVY = Case(
    "prefill-heavy",
    "lognormal:mean=512,cv=0.5,min=32,max=1024",
    "lognormal:mean=16,cv=0.5,min=4,max=48",
    (2.0, 3.5),
)
CASES = {case.name: case for case in (EVEN, PREFILL_HEAVY)}


def settings(checkpoint: Path, slo: Slo, max_batch_tokens: int) -> dict[str, Any]:
    """The cluster's settings; its placement uses the SLO."""
    pool = {"kv_cache_bytes": 2 << 30, "max_batch_tokens": max_batch_tokens, "max_batch_size": 64}
    return {
        "model": {"path": str(checkpoint), "served_name": LLAMA_110M.name},
        "pools": {role: pool | {"instances": instances} for role, instances in WAYS["1P1D"].items()},
        "slo": {"ttft_ms": slo.ttft or 1e6, "itl_ms": slo.tpot or slo.itl or 1e6},
        "listen": {"grpc": "127.0.0.1:0", "http": None},
    }


@contextmanager
def made_checkpoint(dtype: Any) -> Iterator[Path]:
    """Makes a checkpoint with a tokenizer of as many words as the model has tokens."""
    with TemporaryDirectory(prefix="pdserve-bench-") as folder:
        path = ensure_checkpoint(LLAMA_110M, dtype, Path(folder) / LLAMA_110M.name)
        words = Tokenizer(
            WordLevel({f"w{index}": index for index in range(LLAMA_110M.vocab_size)}, unk_token="w0")
        )
        words.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
        yield path


class Switch:
    """Switches a running cluster between the two modes."""

    def __init__(self, address: str, cluster_settings: dict[str, Any]) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = rpc.ClusterStub(self._channel)
        self._settings = cluster_settings

    async def to(self, way: str) -> None:
        """Returns when its workers are ready in their new roles, and idle."""
        pools = {
            role: pool | {"instances": WAYS[way][role]} for role, pool in self._settings["pools"].items()
        }
        text = yaml.safe_dump({"metadata": {"pdserve": self._settings | {"pools": pools}}})
        await self._stub.Apply(pb.ApplyRequest(config_yaml=text))
        async for status in self._stub.WatchStatus(pb.WatchStatusRequest()):
            counts = {role: sum(worker.role == role for worker in status.workers) for role in pools}
            is_idle = not status.num_running_requests and all(
                w.state == READY and not w.num_running for w in status.workers
            )
            if counts == WAYS[way] and is_idle:
                return

    async def close(self) -> None:
        await self._channel.close(None)


async def sweep(address: str, switch: Switch, case: Case, slo: Slo, plan: CampaignPlan) -> list[Point]:
    """Measures one point for each rate."""
    prompts, outputs = (
        parse_lengths(text, lambda path: Path(path).read_text())
        for text in (case.prompt_tokens, case.output_tokens)
    )
    target = GrpcTarget(address)
    points = []
    try:
        for rate in case.rates:
            contenders = [Contender(way, target, partial(switch.to, way)) for way in WAYS]
            # prompts of its own for each point: what an earlier one left in the prefix caches must not help
            seed = plan.seed + zlib.crc32(f"{case.name} {rate:g}".encode())
            results = await run_campaign(
                replace(plan, workload=Drawn(Poisson(rate), prompts, outputs), seed=seed), contenders
            )
            reports = {result.name: result.report(slo) for result in results}
            points.append(Point(case.name, rate, reports, tuple(ratios_of(results[::-1], slo))))
            print(*table(points[-1:]), sep="\n", flush=True)
    finally:
        await target.close()
    return points


async def run(
    checkpoint: Path, cases: list[Case], slo: Slo, max_batch_tokens: int, plan: CampaignPlan
) -> list[Point]:
    cluster_settings = settings(checkpoint, slo, max_batch_tokens)
    with launch(ClusterConfig.model_validate(cluster_settings)) as cluster:
        switch = Switch(cluster.local_address, cluster_settings)
        try:
            await switch.to("1P1D")  # waits for the workers to load
            return [
                point
                for case in cases
                for point in await sweep(cluster.grpc_address, switch, case, slo, plan)
            ]
        finally:
            await switch.close()


def save(points: list[Point], slo: Slo, words: dict[str, Any], folder: Path) -> None:
    stem = f"{date.today()}-disaggregation"
    figures = [asdict(point) for point in points]
    (folder / f"{stem}.json").write_text(json.dumps(words | {"points": figures}, indent=1) + "\n")
    head = [f"{key}: {value}" for key, value in words.items() if key != "cases"]
    (folder / f"{stem}.txt").write_text("\n".join([*head, "", *table(points)]) + "\n")
    draw(points, slo, folder / f"{stem}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rates", help="requests per second, such as 0.5,1; by default the case's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-s", type=float, default=8.0)
    parser.add_argument("--slo", default="ttft=500,tpot=20")
    parser.add_argument("--max-batch-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    cases = [case for case in CASES.values() if args.case in (case.name, "all")]
    if args.rates:
        cases = [replace(case, rates=tuple(map(float, args.rates.split(",")))) for case in cases]
    slo = parse_slo(args.slo)
    unused = Drawn(None, parse_lengths("1", str), parse_lengths("1", str))
    plan = CampaignPlan(
        unused, seed=args.seed, num_rounds=args.rounds, duration_s=args.round_s, num_warm_up=2
    )
    with made_checkpoint(args.dtype) as checkpoint:
        points = asyncio.run(run(checkpoint, cases, slo, args.max_batch_tokens, plan))
    words = vars(args) | {
        "shape": LLAMA_110M.name,
        "cases": [asdict(case) for case in cases],
        "torch": torch.__version__,
    }
    words |= {"machine": platform.platform()}
    print("", *table(points), sep="\n")
    if args.save:
        save(points, slo, words, Path(__file__).resolve().parents[1] / "results")


if __name__ == "__main__":
    main()
