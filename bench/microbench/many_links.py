"""The resources that a worker's links to many peers take: threads, descriptors, memory, and CPU while idle.

    python -m bench.microbench.many_links [--peers 4 16 64 128] [--transport gloo] [--idle-s 10]

One endpoint sends 64 MiB to each of its peers in turn, on loopback, twice; then it is left alone. The peers'
endpoints are in processes of their own, a few dozen in each, and are not counted. The loops of one process
take turns, and beside other load may answer after seconds: the deadlines are long, and only a standstill
fails."""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from bench.microbench.kv_transfer import BLOCK_IDS, LAYOUT, NUM_TOKENS, paged_cache
from bench.transfer_endings import Endings
from pdserve.core.messages import TransferAddress
from pdserve.core.request import TransferId
from pdserve.engine.kv_cache import KVCache
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint

NUM_ROUNDS = 2
DEADLINE_S = 120.0
CONFIG = TransferConfig(
    connect_timeout_s=DEADLINE_S, dead_after_s=DEADLINE_S, chunk_timeout_s=DEADLINE_S, lease_s=DEADLINE_S
)
PEERS_OF_A_PROCESS = 64


class Usage(NamedTuple):
    """The resources that this process holds now."""

    num_threads: int
    num_descriptors: int
    resident_bytes: int

    @classmethod
    def now(cls) -> "Usage":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            pages * resource.getpagesize(),
        )


def open_endpoint(name: str, store: KVCache, endings: Endings, transport: str) -> TransferEndpoint:
    member = Membership(name, 1, "bench", "127.0.0.1")
    return TransferEndpoint(store, endings, member, transport=transport, config=CONFIG)


def receive(pipe: Connection, numbers: range, transport: str) -> None:
    """Some of the peers: the one that the pipe names expects a transfer, until the pipe says None."""
    store, endings = paged_cache(None), Endings()
    endpoints = {number: open_endpoint(f"d{number}", store, endings, transport) for number in numbers}
    pipe.send([endpoint.start() for endpoint in endpoints.values()])
    while (asked := pipe.recv()) is not None:
        number, attempt = asked
        endpoints[number].expect(TransferId(f"r{number}", attempt), ("p", 1), BLOCK_IDS, NUM_TOKENS)
        endings.wait(DEADLINE_S)
    for endpoint in endpoints.values():
        endpoint.close()


def send(pipes: list[Connection], results: Connection, transport: str, idle_s: float) -> None:
    """The measured endpoint; sends a line of results."""
    addresses: list[TransferAddress] = [address for pipe in pipes for address in pipe.recv()]
    endings = Endings()
    endpoint = open_endpoint("p", paged_cache(0), endings, transport)
    endpoint.start()
    before, seconds = Usage.now(), []
    for attempt in range(NUM_ROUNDS):
        for number, address in enumerate(addresses):
            transfer = TransferId(f"r{number}", attempt)
            start_s = time.perf_counter()
            pipes[number // PEERS_OF_A_PROCESS].send((number, attempt))
            endpoint.send(transfer, address, BLOCK_IDS, NUM_TOKENS)
            endpoint.computed(transfer, 0, LAYOUT.num_layers, 0, NUM_TOKENS)
            endpoint.prefill_done(transfer)
            endpoint.commit(transfer, b"")
            endings.wait(DEADLINE_S)
            seconds.append(time.perf_counter() - start_s)
    after, cpu_s = Usage.now(), time.process_time()
    time.sleep(idle_s)
    cpu_s = time.process_time() - cpu_s
    for pipe in pipes:
        pipe.send(None)
    results.send(
        f"{len(addresses):5} peers: {after.num_threads - before.num_threads:5} threads,"
        f" {after.num_descriptors - before.num_descriptors:5} descriptors,"
        f" {(after.resident_bytes - before.resident_bytes) / 2**20:6.0f} MiB,"
        f" idle {cpu_s / idle_s:6.2%} of a core,"
        f" {endpoint.counters.num_links_opened} links opened,"
        f" first transfers {_times(seconds[: len(addresses)])},"
        f" second ones {_times(seconds[len(addresses) :])}"
    )
    endpoint.close()


def _times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms, {max(seconds) * 1e3:.0f} at most"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--transport", choices=("shm", "gloo"), default="gloo")
    parser.add_argument("--idle-s", type=float, default=10.0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for num_peers in args.peers:
        parts = [
            range(num_peers)[first : first + PEERS_OF_A_PROCESS]
            for first in range(0, num_peers, PEERS_OF_A_PROCESS)
        ]
        pipes = [context.Pipe() for _ in parts]
        results, their_results = context.Pipe()
        sends = [ours for ours, _ in pipes], their_results, args.transport, args.idle_s
        processes = [
            context.Process(target=receive, args=(theirs, numbers, args.transport), daemon=True)
            for (_, theirs), numbers in zip(pipes, parts, strict=True)
        ]
        processes.append(context.Process(target=send, args=sends, daemon=True))
        for process in processes:
            process.start()
        their_results.close()  # else a failure would not end `recv`
        print(results.recv(), flush=True)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
