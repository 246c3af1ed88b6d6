"""The host cost of a KV chunk between two workers on one GPU, with the GPU's own work stubbed out.

    python -m bench.microbench.chunk_cost [--chunk-mib 16] [--slots 4] [--transfers 30]
                                [--device-us 100] [--profile]

Two processes, one worker each, over the `cuda_ipc` link: an 8B model's KV layout and prompts of 8K tokens,
reported layer by layer in four prefill chunks. Kernels are not launched and the rings are host memory that
nobody touches; all else is production's. A piece of work counts as done `--device-us` after it was queued.

Prints for each side the processor time a chunk takes (all threads of the process), and the rate that this
allows, for the median transfer and the quickest. What Triton and CUDA take to launch comes on top."""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import queue
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # no GPU's driver is looked for; nothing is interpreted either

import torch

from pdserve.core.failures import FailureKind
from pdserve.core.messages import KVLayout, TransferStats
from pdserve.core.request import TransferId
from pdserve.engine import kv_cache
from pdserve.engine.device import HostDevice, HostEvent
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels import KernelRequirements
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.launch import Launch
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint

LAYOUT = KVLayout(
    num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=64, model_fingerprint="bench"
)
NUM_TOKENS = 8192
PREFILL_TOKENS = 2048
NUM_BLOCKS = NUM_TOKENS // LAYOUT.block_size
WAIT_S = 60.0


class DueEvent(HostEvent):
    """Reached a fixed time after it was recorded."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._due_s = 0.0

    def record(self) -> None:
        self._due_s = time.perf_counter() + self._after_s

    def query(self) -> bool:
        return time.perf_counter() >= self._due_s


class AheadDevice(HostDevice):
    """Computes nothing, and says so only after a while."""

    runs_ahead = True

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self._after_s = after_s

    def event(self) -> DueEvent:
        return DueEvent(self._after_s)


class Untouched:
    """Implements `interfaces.Gpu`: each side has rings of its own, as no byte has to arrive."""

    uuid = "GPU-0"
    device = torch.device("cpu")

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        return self.open(b"", num_bytes), bytes(64)

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


class Ending(NamedTuple):
    stats: TransferStats | None
    processor_s: float
    wall_s: float


class Side:
    """One process' endpoint, and the clocks at each ending."""

    def __init__(self, name: str, arguments: argparse.Namespace, profile: cProfile.Profile | None) -> None:
        self._endings: queue.SimpleQueue[tuple[object, float]] = queue.SimpleQueue()
        torch.set_num_threads(1)
        chunk_bytes = None if arguments.chunk_mib is None else int(arguments.chunk_mib * (1 << 20))
        patch.object(Launch, "run", lambda self: None).start()
        patch.object(
            kv_cache, "_zeros", lambda shape, dtype, on: torch.empty(shape, dtype=dtype, device=on)
        ).start()
        kernels = TritonKernels(KernelRequirements(torch.bfloat16, LAYOUT.head_dim, LAYOUT.block_size))
        self.endpoint = TransferEndpoint(
            KVCache(LAYOUT, NUM_BLOCKS, kernels, AheadDevice(arguments.device_us / 1e6)),
            self,
            Membership(name, 1, "bench", "127.0.0.1"),
            transport="cuda_ipc",
            gpu=Untouched(),
            config=TransferConfig(chunk_bytes=chunk_bytes, ring_slots=arguments.slots),
        )
        self.address = self.endpoint.start()
        if profile is not None:
            self.endpoint._post(profile.enable)  # on the endpoint's thread

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._endings.put((None, time.process_time()))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._endings.put((stats, time.process_time()))

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._endings.put((RuntimeError(error), 0.0))

    on_receive_failed = on_send_failed

    def wait(self, since_processor_s: float, since_s: float) -> Ending:
        ending, processor_s = self._endings.get(timeout=WAIT_S)
        if isinstance(ending, RuntimeError):
            raise ending
        stats = ending if isinstance(ending, TransferStats) else None
        return Ending(stats, processor_s - since_processor_s, time.perf_counter() - since_s)


def receive(pipe: Connection, arguments: argparse.Namespace) -> None:
    """D's process: a reservation for every number that comes, until None does."""
    profile = cProfile.Profile(time.thread_time) if arguments.profile else None
    side = Side("d", arguments, profile)
    pipe.send(side.address)
    ids = tuple(torch.randperm(NUM_BLOCKS).tolist())
    while (number := pipe.recv()) is not None:
        side.endpoint.expect(TransferId("bench", number), ("p", 1), ids, NUM_TOKENS)
        pipe.send(None)
        pipe.send(side.wait(time.process_time(), time.perf_counter()))
    side.endpoint.close()
    if profile is not None:
        _print_profile("D", profile)


def send(side: Side, address: Any, number: int) -> Ending:
    """P's part of one transfer, as a prefill reports it."""
    transfer, endpoint = TransferId("bench", number), side.endpoint
    endpoint.send(transfer, address, (), NUM_TOKENS)
    endpoint.extend(transfer, tuple(range(NUM_BLOCKS)))
    began = time.process_time(), time.perf_counter()
    for start in range(0, NUM_TOKENS, PREFILL_TOKENS):
        for layer in range(LAYOUT.num_layers):
            endpoint.computed(transfer, layer, layer + 1, start, start + PREFILL_TOKENS)
    endpoint.prefill_done(transfer)
    endpoint.commit(transfer, b"token")
    return side.wait(*began)


def _print_profile(name: str, profile: cProfile.Profile) -> None:
    print(f"--- {name}, the endpoint's thread")
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunk-mib", type=float, help="default: what the endpoint chooses")
    parser.add_argument("--slots", type=int, default=TransferConfig().ring_slots)
    parser.add_argument("--transfers", type=int, default=30)
    parser.add_argument("--device-us", type=float, default=100.0, help="until queued work is done")
    parser.add_argument(
        "--profile", action="store_true", help="print where the endpoints' threads spend their time"
    )
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    other = context.Process(target=receive, args=(theirs, arguments), daemon=True)
    other.start()
    profile = cProfile.Profile(time.thread_time) if arguments.profile else None
    side = Side("p", arguments, profile)
    address = pipe.recv()
    sent, received = [], []
    for number in range(arguments.transfers + 3):
        pipe.send(number)
        pipe.recv()
        sent.append(send(side, address, number))
        received.append(pipe.recv())
    pipe.send(None)
    stats = sent[0].stats
    assert stats is not None
    chunk_mib = stats.num_bytes / stats.num_chunks / (1 << 20)
    print(f"{stats.num_chunks} chunks of {chunk_mib:.1f} MiB a transfer, {arguments.transfers} transfers")
    for name, endings in (("P", sent[3:]), ("D", received[3:])):  # behind the warm-up
        each_us = [ending.processor_s / stats.num_chunks * 1e6 for ending in endings]
        print(
            f"{name}: {statistics.median(each_us):.0f} us of processor time a chunk, {min(each_us):.0f} at"
            " least"
        )
    rates = [stats.num_bytes / ending.wall_s / 1e9 for ending in sent[3:]]
    print(f"{statistics.median(rates):.1f} GB/s, {max(rates):.1f} at most")
    side.endpoint.close()
    other.join()
    if profile is not None:
        _print_profile("P", profile)


if __name__ == "__main__":
    main()
