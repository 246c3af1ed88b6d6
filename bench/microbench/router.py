"""Hot paths of the router, one line each: a placement decision, a report of 256 tokens, a step learnt.

    python -m bench.microbench.router [--workers 1000]

Each figure is the median over many calls of the real objects, after a warm-up. Budgets: 50 us a decision,
well under 1 ms a report."""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable

from pdserve.core.hashing import block_hashes
from pdserve.core.latency import LatencyModel
from pdserve.core.messages import (
    KVLayout,
    Role,
    StepReport,
    StepTiming,
    TokenOutput,
    TransferAddress,
    WorkerInfo,
    WorkerLoad,
)
from pdserve.core.request import Request, SamplingParams, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import RouterEvent, Submit, WorkerReady
from pdserve.router.live_request import Job, LiveRequest
from pdserve.router.prefix_index import PrefixIndex

BLOCK_SIZE = 16
LAYOUT = KVLayout(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    block_size=BLOCK_SIZE,
    model_fingerprint="m",
)


def worker(worker_id: str, role: Role) -> WorkerInfo:
    address = TransferAddress(
        worker_id=worker_id, incarnation=1, host_id="h", unix_path="", tcp_host="", tcp_port=0
    )
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=1,
        role=role,
        layout=LAYOUT,
        num_blocks=100_000,
        max_model_len=32_768,
        max_batch_tokens=8192,
        max_batch_size=512,
        address=address,
        devices=("cuda:0",),
        node="n",
        pid=1,
        kernels="torch",
    )


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 256) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def cluster(num_workers: int) -> Router:
    router = Router(RouterConfig(max_prefill_backlog_tokens=1 << 30, max_queued_requests=1 << 30))
    for i in range(num_workers // 2):
        router.handle(WorkerReady(worker(f"prefill-{i}", Role.PREFILL)), 0.0)
        router.handle(WorkerReady(worker(f"decode-{i}", Role.DECODE)), 0.0)
    return router


def median_us(call: Callable[[int], object], count: int) -> float:
    times = []
    for i in range(count):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times[count // 10 :]) * 1e6


def decision(num_workers: int, num_tokens: int, holders: int) -> tuple[float, float]:
    """(decision alone, whole Submit) in us, on a loaded cluster, with half of the prompt cached at `holders`
    workers."""
    router, rng = cluster(num_workers), random.Random(0)
    shared = tuple(rng.randrange(50_000) for _ in range(num_tokens // 2))
    hashes = tuple(block_hashes(shared, BLOCK_SIZE))
    for i in range(holders):
        for kind in ("prefill", "decode"):
            report = StepReport(
                worker_id=f"{kind}-{i}", incarnation=1, load=WorkerLoad(), blocks_added=hashes
            )
            router.handle(report, 0.0)

    def prompt() -> tuple[int, ...]:
        return shared + tuple(rng.randrange(50_000) for _ in range(num_tokens - len(shared)))

    for i in range(2 * num_workers):
        router.handle(
            Submit(request(f"w{i}", tuple(rng.randrange(50_000) for _ in range(rng.randrange(1, 500))))), 0.0
        )
    jobs = [Job(LiveRequest(request(f"d{i}", prompt()), 0.0), (0,), (), 0.0) for i in range(500)]
    for job in jobs:
        router._placer.place(job)  # hashes the prompt, which is a cost per token and not per decision
    alone_us = median_us(lambda i: router._placer.place(jobs[i]), len(jobs))
    submits = [Submit(request(f"s{i}", prompt())) for i in range(500)]
    return alone_us, median_us(lambda i: router.handle(submits[i], 0.0), len(submits))


DECODE_APART = RouterConfig(
    max_prefill_backlog_tokens=1 << 30, prefill_on_decode_factor=None, max_unread_tokens=1 << 30
)


def step(num_sequences: int, worker_id: str, index: int) -> StepReport:
    """One token of each of the requests that `decoding` submits."""
    outputs = tuple(TokenOutput(TransferId(f"r{i}", i), 0, index, 7) for i in range(num_sequences))
    timing = StepTiming(
        num_prefill_tokens=0,
        sum_prefill_squares=0,
        num_decode_sequences=num_sequences,
        num_context_tokens=num_sequences * index,
        duration_s=0.02,
    )
    return StepReport(worker_id=worker_id, incarnation=1, load=WorkerLoad(), outputs=outputs, timing=timing)


def decoding(handle: Callable[[RouterEvent], object], num_sequences: int) -> None:
    """Sets up two workers, and `num_sequences` requests with their first token."""
    handle(WorkerReady(worker("prefill-0", Role.PREFILL)))
    handle(WorkerReady(worker("decode-0", Role.DECODE)))
    for i in range(num_sequences):
        handle(Submit(request(f"r{i}", (1, 2, 3), max_tokens=4096)))
    handle(step(num_sequences, "prefill-0", 0))


def report_us(num_sequences: int) -> float:
    """A decode step of `num_sequences` tokens, each of another request."""
    router = Router(DECODE_APART)
    decoding(lambda event: router.handle(event, 0.0), num_sequences)
    steps = [step(num_sequences, "decode-0", index) for index in range(1, 301)]
    return median_us(lambda i: router.handle(steps[i], 0.01 * i), len(steps))


def observe_us() -> float:
    model, rng = LatencyModel(), random.Random(0)
    timings = [
        StepTiming(
            num_prefill_tokens=0,
            sum_prefill_squares=0,
            num_decode_sequences=rng.randrange(1, 256),
            num_context_tokens=rng.randrange(1, 100_000),
            duration_s=rng.uniform(0.01, 0.02),
        )
        for _ in range(3000)
    ]
    return median_us(lambda i: model.observe_step(timings[i]), len(timings))


def collection_ms(num_blocks: int) -> float:
    """Returns what a full garbage collection takes with a prefix index of so many blocks, less without."""
    index, rng = PrefixIndex(), random.Random(0)
    for number in range(8):
        index.update(f"worker-{number}", (rng.randbytes(16) for _ in range(num_blocks // 8)), ())

    def collect() -> float:
        started_s = time.process_time()
        gc.collect()
        return time.process_time() - started_s

    full_s = statistics.median(collect() for _ in range(9))
    del index
    return (full_s - statistics.median(collect() for _ in range(9))) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=1000)
    num_workers = parser.parse_args().workers
    for num_tokens, holders in ((512, 0), (512, 4), (8192, 4), (8192, num_workers // 2)):
        alone, whole = decision(num_workers, num_tokens, holders)
        print(
            f"{num_workers} workers, prompt {num_tokens:5d}, prefix at {2 * holders:4d}: "
            f"decision {alone:6.1f} us, whole submit {whole:6.1f} us"
        )
    print(f"report of 256 tokens: {report_us(256):6.1f} us")
    print(f"step learnt: {observe_us():6.1f} us")
    print(
        f"full garbage collection: {collection_ms(1_000_000):6.2f} ms more with 1,000,000 blocks in the index"
    )


if __name__ == "__main__":
    main()
