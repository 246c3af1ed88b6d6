"""The overhead of the cluster (router, Ray, gRPC) over a bare engine at batch 1: time to first token, and
time between tokens.

    python -m bench.microbench.overhead

The embedded model, whose steps are short, so that what is added shows. The bare engine and a cluster of one
prefill and one decode worker, a core each, take turns; every prompt is new to all of them."""

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import grpc

from bench.comparison.peers.pdserve_peer import ColocatedWorker, open_engine
from bench.comparison.peers.protocol import PeerOptions
from pdserve.cluster.launch import launch
from pdserve.core.config import ClusterConfig
from pdserve.embedded import MODEL_DIR
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

CONFIG = {
    "routing": {"prefill_on_decode": "never"},
    "listen": {"grpc": "127.0.0.1:0", "http": None},
    "pools": {"prefill": {"kv_cache_bytes": 64 << 20}, "decode": {"kv_cache_bytes": 64 << 20}},
}


@dataclass
class Latencies:
    """The latencies of many requests, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    def add(self, start_s: float, arrivals_s: tuple[float, ...]) -> None:
        self.ttft_s.append(arrivals_s[0] - start_s)
        self.itl_s += [
            later - earlier for earlier, later in pairwise(arrivals_s[1:])
        ]  # both by the decode worker


@contextmanager
def running_cluster() -> Iterator[rpc.GenerationStub]:
    with (
        launch(ClusterConfig.model_validate(CONFIG)) as cluster,
        grpc.insecure_channel(cluster.local_address) as local,
        grpc.insecure_channel(cluster.grpc_address) as channel,
    ):
        for status in rpc.ClusterStub(local).WatchStatus(pb.WatchStatusRequest()):
            if len(status.workers) == 2 and all(
                worker.state == pb.WORKER_STATE_READY for worker in status.workers
            ):
                break
        yield rpc.GenerationStub(channel)


def ask(stub: rpc.GenerationStub, prompt: list[int], num_new_tokens: int, into: Latencies) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
        sampling=pb.SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True),
    )
    start_s = time.perf_counter()
    arrivals_s = []
    for event in stub.GenerateStream(request):
        if event.HasField("tokens"):
            arrivals_s += [time.perf_counter()] * len(event.tokens.token_ids)
    into.add(start_s, tuple(arrivals_s))


def measure(
    num_requests: int = 40, num_prompt_tokens: int = 256, num_new_tokens: int = 64
) -> tuple[Latencies, Latencies]:
    """(bare, cluster)."""
    rng = random.Random(0)
    bare, cluster = Latencies(), Latencies()
    options = PeerOptions(MODEL_DIR, "embedded", "bfloat16", num_threads=1, num_repeats=1, cases=())
    with running_cluster() as stub:
        os.environ["OMP_NUM_THREADS"] = "1"
        worker = ColocatedWorker(open_engine(options))
        for number in range(num_requests + 3):
            prompt = [rng.randrange(10, 2000) for _ in range(num_prompt_tokens)]
            if number == 3:  # the first ones warm up
                bare, cluster = Latencies(), Latencies()
            timeline = worker.run([prompt], num_new_tokens)
            bare.add(timeline.start_s, timeline.arrivals_s[0])
            ask(stub, prompt, num_new_tokens, cluster)
    return bare, cluster


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    report(*measure(args.requests, args.prompt_tokens, args.new_tokens))


def report(bare: Latencies, cluster: Latencies) -> None:
    print(
        f"{'ms at batch 1':16} {'bare engine':>12} {'cluster':>12} {'added':>12}   (medians,"
        f" {len(bare.ttft_s)} requests)"
    )
    for name, ours, theirs in (("TTFT", bare.ttft_s, cluster.ttft_s), ("ITL", bare.itl_s, cluster.itl_s)):
        engine_ms, cluster_ms = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
        print(f"{name:16} {engine_ms:12.3f} {cluster_ms:12.3f} {cluster_ms - engine_ms:12.3f}")


if __name__ == "__main__":
    main()
