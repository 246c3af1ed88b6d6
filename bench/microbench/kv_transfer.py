"""KV transfer against a plain shared-memory copy of the same bytes, both between two processes, interleaved
in one run.

    python -m bench.microbench.kv_transfer

The plain copy is the least any shared-memory transfer must do: one process copies the source into a ring in
shared memory, the other copies it out, pipelined by the same chunk. The transfer also picks tokens out of
paged blocks, checks sums, and puts them into paged blocks."""

import argparse
import mmap
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from bench.transfer_endings import Endings
from pdserve.core.messages import KVLayout, TransferAddress
from pdserve.core.request import TransferId
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels.interface import KernelRequirements
from pdserve.kernels.load import load_kernels
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint

LAYOUT = KVLayout(
    num_layers=16, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=32, model_fingerprint="bench"
)
NUM_TOKENS = 1024
NUM_BYTES = NUM_TOKENS * LAYOUT.bytes_per_token  # 64 MiB
NUM_BLOCKS = NUM_TOKENS // LAYOUT.block_size
RING_SLOTS = 4
BLOCK_IDS = tuple(int(i) for i in np.random.default_rng(0).permutation(NUM_BLOCKS))


def paged_cache(seed: int | None) -> KVCache:
    """The engine's own, its blocks filled with numbers or empty."""
    requirements = KernelRequirements(torch.bfloat16, LAYOUT.head_dim, LAYOUT.block_size)
    cache = KVCache(LAYOUT, NUM_BLOCKS, load_kernels("cpu", requirements, "auto", 1))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for layer in range(LAYOUT.num_layers):
            for part in cache.layer(layer):
                part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def digest(cache: KVCache) -> int:
    parts = [part for layer in range(LAYOUT.num_layers) for part in cache.layer(layer)]
    return sum(int(part.view(torch.int16).to(torch.int64).sum()) for part in parts)


def open_endpoint(
    name: str, store: KVCache, endings: Endings, transport: str, chunk_bytes: int
) -> tuple[TransferEndpoint, TransferAddress]:
    config = TransferConfig(chunk_bytes=chunk_bytes, ring_slots=RING_SLOTS)
    endpoint = TransferEndpoint(
        store,
        endings,
        Membership(name, 1, "bench", "127.0.0.1"),
        transport=transport,
        config=config,
    )
    return endpoint, endpoint.start()


class Plain:
    """The baseline's ring, in both processes."""

    def __init__(self, free: Any, full: Any, ring: mmap.mmap, chunk_bytes: int) -> None:
        self._free, self._full, self._chunk_bytes = free, full, chunk_bytes
        self._ring = np.frombuffer(ring, np.uint8)

    def _slot(self, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        start = index % RING_SLOTS * self._chunk_bytes
        return self._ring[start : start + self._chunk_bytes]

    def copy_in(self, source: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        for index, start in enumerate(range(0, NUM_BYTES, self._chunk_bytes)):
            self._free.acquire()
            self._slot(index)[:] = source[start : start + self._chunk_bytes]
            self._full.release()

    def copy_out(self, target: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        for index, start in enumerate(range(0, NUM_BYTES, self._chunk_bytes)):
            self._full.acquire()
            target[start : start + self._chunk_bytes] = self._slot(index)
            self._free.release()


def decode_process(pipe: Connection, parents_pipe: Connection, plain: Plain, chunk_bytes: int) -> None:
    """D: does what the other process asks for, and says when it is done; ends with it."""
    parents_pipe.close()
    pin(1)
    store, flat = paged_cache(None), np.zeros(NUM_BYTES, np.uint8)
    endings = Endings()
    endpoints = {
        name: open_endpoint(f"d-{name}", store, endings, name, chunk_bytes) for name in ("shm", "gloo")
    }
    pipe.send({name: address for name, (_, address) in endpoints.items()})
    with suppress(EOFError):
        while True:
            what, number = pipe.recv()
            if what == "plain":
                pipe.send("ready")
                plain.copy_out(flat)
            elif what == "digest":
                pipe.send(digest(store))
                continue
            else:
                endpoint, _ = endpoints[what]
                endpoint.expect(TransferId(what, number), ("p-" + what, 1), BLOCK_IDS, NUM_TOKENS)
                pipe.send("ready")
                endings.wait()
            pipe.send("done")
    for endpoint, _ in endpoints.values():
        endpoint.close()


def pin(half: int) -> None:
    """Each process on its own half of the cores, as the cluster places its workers."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[half::2])


def timed(pipe: Connection, what: str, number: int, push: Callable[[], None]) -> float:
    """GB/s from the first byte to the other process's word that it has the last."""
    pipe.send((what, number))
    pipe.recv()
    start = time.perf_counter()
    push()
    pipe.recv()
    return NUM_BYTES / (time.perf_counter() - start) / 1e9


def measure(chunk_bytes: int, repeats: int) -> dict[str, list[float]]:
    context = multiprocessing.get_context("fork")
    ring = mmap.mmap(
        -1, RING_SLOTS * chunk_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    )
    plain = Plain(context.Semaphore(RING_SLOTS), context.Semaphore(0), ring, chunk_bytes)
    pipe, child_pipe = context.Pipe()
    child = context.Process(target=decode_process, args=(child_pipe, pipe, plain, chunk_bytes), daemon=True)
    child.start()
    child_pipe.close()
    cores = os.sched_getaffinity(0)
    pin(0)
    store, endings = paged_cache(1), Endings()
    flat = np.ones(NUM_BYTES, np.uint8)
    copy = np.zeros_like(flat)
    addresses: dict[str, TransferAddress] = pipe.recv()
    endpoints = {name: open_endpoint(f"p-{name}", store, endings, name, chunk_bytes)[0] for name in addresses}

    def push(name: str, number: int) -> None:
        endpoint, transfer = endpoints[name], TransferId(name, number)
        endpoint.send(transfer, addresses[name], BLOCK_IDS, NUM_TOKENS)
        endpoint.computed(transfer, 0, LAYOUT.num_layers, 0, NUM_TOKENS)
        endpoint.prefill_done(transfer)
        endpoint.commit(transfer, b"")
        endings.wait()

    rates: dict[str, list[float]] = {"memcpy": [], "plain": [], "shm": [], "gloo": []}
    for number in range(repeats + 1):
        start = time.perf_counter()
        copy[:] = flat
        rates["memcpy"].append(NUM_BYTES / (time.perf_counter() - start) / 1e9)
        rates["plain"].append(timed(pipe, "plain", number, lambda: plain.copy_in(flat)))
        for name in endpoints:
            rates[name].append(timed(pipe, name, number, partial(push, name, number)))
    pipe.send(("digest", 0))
    if pipe.recv() != digest(store):
        raise RuntimeError("what arrived is not what was sent")
    for endpoint in endpoints.values():
        endpoint.close()
    pipe.close()
    child.join()
    os.sched_setaffinity(0, cores)
    return {name: values[1:] for name, values in rates.items()}  # the first pass touches memory and connects


def report(chunk_mib: int, rates: dict[str, list[float]]) -> str:
    """One line: medians, and ratios both of medians and of the best passes (what the machine does when nobody
    disturbs)."""
    middle = {name: statistics.median(values) for name, values in rates.items()}
    best = {name: max(values) for name, values in rates.items()}
    cells = [f"{middle[name]:6.2f} ({best[name]:5.2f})" for name in ("memcpy", "plain", "shm", "gloo")]
    ratios = [
        f"{middle[name] / middle['plain']:.0%} ({best[name] / best['plain']:.0%})" for name in ("shm", "gloo")
    ]
    return f"{chunk_mib:>2} MiB  " + "  ".join(cells + [f"{ratio:>11}" for ratio in ratios])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    print(
        f"{NUM_BYTES >> 20} MiB, {RING_SLOTS} ring slots, median (best) of {args.repeats}, GB/s,"
        f" {os.cpu_count()} cores"
    )
    names = [f"{name:>14}" for name in ("memcpy", "plain", "shm", "gloo")]
    print(
        "chunk   "
        + "  ".join(names)
        + "  "
        + "  ".join(f"{name:>11}" for name in ("shm/plain", "gloo/plain"))
    )
    for chunk_mib in args.chunk_mib:
        print(report(chunk_mib, measure(chunk_mib << 20, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
