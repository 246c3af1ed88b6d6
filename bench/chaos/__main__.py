"""A real cluster under accidents: workers and their router are killed, frozen, cut off or made to work badly
while streams run, and nothing may be lost.

    python -m bench.chaos                     200 rounds of kills and freezes, about half an hour on 2 cores
    python -m bench.chaos --partitions        partitions too, in a network namespace; takes root, `tc`
    python -m bench.chaos --gray              instead: sends that fail, a worker at a tenth of its speed, a
                                              router that stands still for 20 s, requests that kill workers
    python -m bench.chaos --hosts             partitions too, on three hosts; takes root, sshd and rsync
    python -m bench.chaos --ranks 2           workers of two ranks, of which an accident hits any one

Two prefill and two decode workers of the embedded model, half a core each. First the tokens of an undisturbed
run are recorded. Then, in each round, six concurrent gRPC streams, greedy and seeded, long prompts and short,
are disturbed by one to three accidents at drawn moments. A client whose router was killed comes back to the
next one for the rest of its stream. Each stream must end by itself with exactly the undisturbed tokens, text
and endings. Every few rounds the cluster has to become whole and idle, with every block free; at the end no
process, socket, shared memory or file may be left. The same --seed draws the same accidents; when exactly
they fall depends on the machine.

Exit status 1 when a stream was lost or altered, anything leaked, or a deadly request killed more than two
workers or did not end with INTERNAL.
"""

import argparse
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import ray
import torch

from bench.chaos.accidents import ClusterUnderTest, draw, draw_gray, strike
from bench.chaos.account import Account, slowness
from bench.chaos.gray import GrayFaults, hooked
from bench.chaos.hosts import are_entered, enter_hosts, entered
from bench.chaos.leftovers import descendants, holdings, mark_descendants, traces
from bench.chaos.network import Loopback, NetworkFaults, enter_namespace
from bench.chaos.streams import ObservedStream, Template, make_templates, run_streams
from bench.chaos.watch import Watch
from pdserve.cluster.launch import launch
from pdserve.core.config import ClusterConfig
from pdserve.proto import pdserve_pb2_grpc as rpc

POOLS = {"prefill": 2, "decode": 2}
NUM_TEMPLATES = 24
NUM_STREAMS = 6
ROUNDS_TO_SETTLE = 10
SETTLE_TIMEOUT_S = 180.0
# the longest pause of clients between retries without a router; gRPC would pause for up to two minutes
RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


@dataclass(frozen=True)
class Ordeal:
    """A running cluster and what its streams are compared with."""

    cluster: ClusterUnderTest
    templates: Sequence[Template]
    undisturbed: Sequence[ObservedStream]
    num_ranks: int  # of each worker

    @property
    def num_processes(self) -> int:
        return sum(POOLS.values()) * self.num_ranks


def config(transport: str, num_ranks: int) -> ClusterConfig:
    """KV for some 6,500 tokens a worker, so that memory is short while one stands in for others."""
    pool: dict[str, Any] = {"cpus_per_instance": 0.5, "kv_cache_bytes": 16 << 20, "max_batch_size": 64}
    pool["tensor_parallel"] = num_ranks
    return ClusterConfig.model_validate(
        {
            "pools": {role: pool | {"instances": instances} for role, instances in POOLS.items()},
            "routing": {"prefill_on_decode": "never"},
            "kv": {"transport": transport},
            "listen": {"grpc": "127.0.0.1:0", "http": None},
        }
    )


@contextmanager
def running(
    templates: Sequence[Template], network: NetworkFaults | None, gray: GrayFaults | None, num_ranks: int
) -> Iterator[Ordeal]:
    """Starts the cluster and records the undisturbed tokens: each request alone, then all at once."""
    with (
        launch(config("auto" if network is None else "gloo", num_ranks)) as cluster,
        grpc.insecure_channel(cluster.local_address, RECONNECT) as local,
        grpc.insecure_channel(cluster.grpc_address, RECONNECT) as channel,
    ):
        watch = Watch(rpc.ClusterStub(local), POOLS)
        watch.wait_for(watch.is_whole, SETTLE_TIMEOUT_S)
        generation = rpc.GenerationStub(channel)
        undisturbed = [
            run_streams(generation, [template], f"alone {number}")[0]
            for number, template in enumerate(templates)
        ]
        together = run_streams(generation, templates, "together")
        outcomes = [
            stream.outcome(alone)
            for stream, alone in zip(undisturbed + together, undisturbed * 2, strict=True)
        ]
        assert set(outcomes) == {"whole"}, f"without any accident: {outcomes}"
        watch.wait_for(watch.is_idle, SETTLE_TIMEOUT_S)
        try:
            yield Ordeal(
                ClusterUnderTest(generation, watch, network, gray), templates, undisturbed, num_ranks
            )
        finally:
            watch.close()


def run_round(ordeal: Ordeal, rng: random.Random, number: int, account: Account) -> list[str]:
    """Runs one set of streams and its accidents; returns the problems."""
    chosen = rng.sample(range(len(ordeal.templates)), NUM_STREAMS)
    cluster = ordeal.cluster
    accidents = [
        draw(rng, cluster.network is not None) if cluster.gray is None else draw_gray(rng)
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    order = ("before the first token", "during the transfer", "mid decode")
    accidents.sort(key=lambda accident: (order.index(accident.moment), accident.progress))

    def disturb(streams: list[ObservedStream]) -> None:
        for accident in accidents:
            strike(accident, streams, cluster, rng)

    start_s = time.monotonic()
    streams = run_streams(
        cluster.generation, [ordeal.templates[index] for index in chosen], f"round {number}", disturb
    )
    for accident in accidents:
        if accident.ended is not None:
            accident.ended.join()
    problems = account.add_round(accidents, streams, [ordeal.undisturbed[index] for index in chosen])
    print(
        f"round {number}: {time.monotonic() - start_s:.1f} s; {'; '.join(map(str, accidents))}",
        *problems,
        *account.add_replaced(cluster.watch),
        *slowness(streams),
        sep="\n  ",
        flush=True,
    )
    return problems


def settle(ordeal: Ordeal, account: Account) -> None:
    """Waits until the cluster is whole and idle again; otherwise there is a leak."""
    start_s = time.monotonic()
    try:
        ordeal.cluster.watch.wait_for(ordeal.cluster.watch.is_idle, SETTLE_TIMEOUT_S)
    except TimeoutError as error:
        account.leaks.append(f"not whole and idle {error}")
    print(f"whole and idle after {time.monotonic() - start_s:.1f} s", flush=True)
    num_processes = holdings("WorkerActor")["processes"]
    if num_processes != ordeal.num_processes:
        account.leaks.append(f"{num_processes} worker processes")


def check_holdings(before: dict[str, dict[str, int]], ordeal: Ordeal, account: Account) -> None:
    """The present head has no socket or file more than the first one had. Each rank has a ring, or none, with
    one of each worker of the other pool, and the memory in which it meets its siblings."""
    head, workers = holdings("HeadActor"), holdings("WorkerActor")
    print(f"at start: {before}\nat the end: head {head}, workers {workers}, keeper {holdings('KeeperActor')}")
    for kind in ("processes", "sockets", "files"):
        if head[kind] > before["head"][kind]:
            account.leaks.append(f"{head[kind]} {kind} of the head, {before['head'][kind]} at start")
    max_rings = 2 * POOLS["prefill"] * POOLS["decode"] * ordeal.num_ranks
    if workers["rings"] > max_rings + (ordeal.num_processes if ordeal.num_ranks > 1 else 0):
        account.leaks.append(f"{workers['rings']} rings of shared memory")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4, 8))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--partitions", action="store_true")
    where.add_argument("--hosts", action="store_true")
    where.add_argument("--gray", action="store_true")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    network: NetworkFaults | None = None
    if args.partitions:
        enter_namespace()
        network = Loopback()
    if args.hosts:
        if not are_entered():
            return enter_hosts()
        network = entered()
    mark_descendants()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it otherwise
    rng, account, found, others = random.Random(args.seed), Account(), traces(), descendants()
    with (
        hooked() if args.gray else nullcontext() as gray,
        running(make_templates(rng, NUM_TEMPLATES), network, gray, args.ranks) as ordeal,
    ):
        before = {"head": holdings("HeadActor"), "workers": holdings("WorkerActor")}
        try:
            for number in range(args.rounds):
                run_round(ordeal, rng, number, account)
                if (number + 1) % ROUNDS_TO_SETTLE == 0:
                    settle(ordeal, account)
        except KeyboardInterrupt:
            print("interrupted: the table is of the rounds so far")
        settle(ordeal, account)
        check_holdings(before, ordeal, account)
        table = account.lines(ordeal.cluster.watch)
        if gray is not None:
            table.append(f"{'sends that failed on purpose':44} {gray.num_failed_sends()}")
    account.leaks += [
        f"process {pid}: {command}" for pid, command in descendants().items() if pid not in others
    ]
    account.leaks += sorted(traces() - found)
    report = "\n".join([*_heading(), "", *table, *(f"leaked: {leak}" for leak in account.leaks)])
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")
    has_failed = account.outcomes["lost"] or account.outcomes["altered"] or account.num_broken_promises
    return 1 if account.leaks or has_failed else 0


def _heading() -> list[str]:
    return [
        f"$ python -m bench.chaos {' '.join(sys.argv[1:])}",
        (
            f"{date.today()}, {platform.machine()}, Linux {platform.release().split('-')[0]}, Python"
            f" {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}, grpcio"
            f" {grpc.__version__}"
        ),
        (
            f"embedded model, {POOLS['prefill']} prefill and {POOLS['decode']} decode workers, half a core"
            f" each; {NUM_STREAMS} concurrent streams a round"
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
