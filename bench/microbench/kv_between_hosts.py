"""KV transfer between two hosts over gloo, against plain TCP with the same bytes, in turns; in clear and
through WireGuard.

    python -m bench.microbench.kv_between_hosts [--rate 1gbit] [--rounds 9]

The hosts are network namespaces on this machine (tests/hosts): takes root. Without --rate the link is as fast
as the machine's memory, and both ends and the link share its processor."""

import argparse
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.microbench.kv_transfer import (
    BLOCK_IDS,
    LAYOUT,
    NUM_BYTES,
    NUM_TOKENS,
    digest,
    paged_cache,
)
from bench.transfer_endings import Endings
from pdserve.core.messages import TransferAddress
from pdserve.core.request import TransferId
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint
from tests.hosts.network import Hosts
from tests.hosts.wireguard import encrypt, has_module, whats_missing

TIMEOUT_S = 60.0


def open_endpoint(
    name: str, store: Any, endings: Endings, address: str
) -> tuple[TransferEndpoint, TransferAddress]:
    endpoint = TransferEndpoint(
        store,
        endings,
        Membership(name, 1, "bench", address),
        transport="gloo",
        config=TransferConfig(),
    )
    return endpoint, endpoint.start()


def receive(pipe: Connection, hosts: Hosts, host: str, addresses: dict[str, str]) -> None:
    """The second host: receives whatever is announced, until the pipe closes."""
    hosts.enter(host)
    store, endings, buffer = paged_cache(None), Endings(), bytearray(NUM_BYTES)
    opened = {
        name: open_endpoint(f"d-{name}", store, endings, address) for name, address in addresses.items()
    }
    listeners = {name: socket.create_server((address, 0)) for name, address in addresses.items()}
    ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
    pipe.send(({name: address for name, (_, address) in opened.items()}, ports))
    connections: dict[str, socket.socket] = {}
    while (asked := pipe.recv()) is not None:
        name, kind, number = asked
        if kind == "connect":
            connections[name] = listeners[name].accept()[0]
        elif kind == "plain":
            view = memoryview(buffer)
            while view:
                view = view[connections[name].recv_into(view) :]
        else:
            opened[name][0].expect(TransferId(name, number), (f"p-{name}", 1), BLOCK_IDS, NUM_TOKENS)
            pipe.send("ready")
            endings.wait()
        pipe.send(digest(store) if kind == "gloo" else "done")
    for endpoint, _ in opened.values():
        endpoint.close()


def send(
    pipe: Connection, hosts: Hosts, host: str, addresses: dict[str, str], rounds: int, results: Connection
) -> None:
    """The first host: sends in turns, and measures until the other has everything."""
    hosts.enter(host)
    store, endings = paged_cache(0), Endings()
    expected, data = digest(store), bytes(NUM_BYTES)
    targets, ports = pipe.recv()
    opened = {
        name: open_endpoint(f"p-{name}", store, endings, address)[0] for name, address in addresses.items()
    }
    plain: dict[str, socket.socket] = {}
    for name, port in ports.items():
        plain[name] = socket.create_connection((targets[name].tcp_host, port), TIMEOUT_S)
        pipe.send((name, "connect", 0))
        pipe.recv()

    def by_tcp(name: str, number: int) -> None:
        pipe.send((name, "plain", number))
        plain[name].sendall(data)
        assert pipe.recv() == "done"

    def by_gloo(name: str, number: int) -> None:
        pipe.send((name, "gloo", number))
        assert pipe.recv() == "ready"
        transfer = TransferId(name, number)
        opened[name].send(transfer, targets[name], BLOCK_IDS, NUM_TOKENS)
        opened[name].computed(transfer, 0, LAYOUT.num_layers, 0, NUM_TOKENS)
        opened[name].prefill_done(transfer)
        opened[name].commit(transfer, b"")
        endings.wait()
        assert pipe.recv() == expected

    seconds: dict[tuple[str, str], list[float]] = {}
    kinds: dict[str, Callable[[str, int], None]] = {"plain": by_tcp, "gloo": by_gloo}
    for number in range(rounds + 1):  # the first warms up
        for name in addresses:
            for kind, do in kinds.items():
                start_s = time.perf_counter()
                do(name, number)
                if number:
                    seconds.setdefault((name, kind), []).append(time.perf_counter() - start_s)
    pipe.send(None)
    for endpoint in opened.values():
        endpoint.close()
    results.send(seconds)


def measure(
    hosts: Hosts, one: str, two: str, networks: dict[str, dict[str, str]], rounds: int
) -> dict[str, dict[str, float]]:
    """Returns the median bytes per second from one host to another, by network and kind. `networks`: by name,
    both hosts' addresses there."""
    ours, theirs = multiprocessing.Pipe()
    results, their_results = multiprocessing.Pipe()
    sending = {name: addresses[one] for name, addresses in networks.items()}
    receiving = {name: addresses[two] for name, addresses in networks.items()}
    sender = multiprocessing.Process(target=send, args=(ours, hosts, one, sending, rounds, their_results))
    receiver = multiprocessing.Process(target=receive, args=(theirs, hosts, two, receiving))
    for process in (receiver, sender):
        process.start()
    seconds = results.recv()
    for process in (receiver, sender):
        process.join()
    return {
        name: {kind: NUM_BYTES / statistics.median(seconds[name, kind]) for kind in ("plain", "gloo")}
        for name in networks
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="", help="of each host's link, as tc writes it: 1gbit")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with Hosts("kvbench") as hosts:
        hosts.up(["one", "two"])
        if args.rate:
            for host in hosts.names():
                hosts.shape(host, rate=args.rate)
        networks = {"clear": {host: hosts.address(host) for host in hosts.names()}}
        if reason := whats_missing():
            print(f"without WireGuard: {reason}")
        else:
            networks[f"WireGuard ({'kernel' if has_module() else 'wireguard-go'})"] = encrypt(hosts)
        rates = measure(hosts, "one", "two", networks, args.rounds)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, link"
        f" {args.rate or 'not limited'}, 64 MiB of KV"
    )
    for name, rate in rates.items():
        print(f"{name}: {as_text(rate)}")


def as_text(rate: dict[str, float]) -> str:
    plain, gloo = rate["plain"], rate["gloo"]
    return (
        f"plain TCP {plain / 1e6:6.0f} MB/s, KV over gloo {gloo / 1e6:6.0f} MB/s ({gloo / plain:.0%} of it)"
    )


if __name__ == "__main__":
    main()
