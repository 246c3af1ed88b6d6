"""A cluster on three hosts of one machine (tests/hosts), whose links can be cut.

The hosts are what Ray and the workers see of the network; processes, files and shared memory are this
machine's, so that what is left behind is found as it is elsewhere. This process and the head live on the
first host, workers on the other two."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from bench.chaos.leftovers import mark_descendants
from pdserve.cluster import ray_address
from tests.hosts.network import NAMESPACES, Hosts

NETWORK, HEAD, WORKERS = "ordeal", "head", ("one", "two")
INSIDE = "PDSERVE_ORDEAL_HOSTS"
PORT = 6379
CORES = {HEAD: 0} | dict.fromkeys(WORKERS, 1)


class HostNetwork:
    """Cuts links between hosts. A link that is cut twice is mended once."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._cuts: dict[frozenset[str], int] = {}

    def cut_from_router(self, pids: Iterable[int], router: int) -> Callable[[], None] | None:
        return self._cut(pids, [router])

    def cut_from_peers(self, pids: Iterable[int], peers: Iterable[int]) -> Callable[[], None] | None:
        return self._cut(pids, peers)

    def _cut(self, pids: Iterable[int], peers: Iterable[int]) -> Callable[[], None] | None:
        """Cuts the hosts apart; None where all processes are on one host."""
        pairs = product({self._host_of(pid) for pid in pids}, {self._host_of(pid) for pid in peers})
        links = {frozenset(pair) for pair in pairs if len(set(pair)) == 2}
        for link in links:
            self._cuts[link] = self._cuts.get(link, 0) + 1
            self._hosts.cut(*link)
        return (lambda: self._mend(links)) if links else None

    def _mend(self, links: Iterable[frozenset[str]]) -> None:
        for link in links:
            self._cuts[link] -= 1
            if not self._cuts[link]:
                self._hosts.heal(*link)

    def _host_of(self, pid: int) -> str:
        """Raises FileNotFoundError for a process that is gone."""
        network = Path(f"/proc/{pid}/ns/net").stat().st_ino
        spaces = {
            Path(NAMESPACES, self._hosts.space(name)).stat().st_ino: name for name in self._hosts.names()
        }
        return spaces[network]


def are_entered() -> bool:
    """Whether this process is on the first of the hosts."""
    return INSIDE in os.environ


def entered() -> HostNetwork:
    """The network of the hosts that this process is on."""
    return HostNetwork(Hosts(NETWORK))


def enter_hosts() -> int:
    """Makes the hosts, with Ray on them, and runs this program again on the first one. Returns its exit
    status."""
    with Hosts(NETWORK) as hosts, tempfile.TemporaryDirectory(prefix="pdserve-ordeal-", dir="/tmp") as folder:
        hosts.up([HEAD, *WORKERS])
        token = Path(folder, "token")
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        address = f"{hosts.address(HEAD)}:{PORT}"
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_worker_niceness": "0",  # as in cluster.yaml
            ray_address.VARIABLE: address,
            INSIDE: "1",
        }
        mark_descendants()  # Ray's processes too, which make those of the cluster
        for name in hosts.names():
            role = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"]
                if name == HEAD
                else [f"--address={address}"]
            )
            options = [
                f"--node-ip-address={hosts.address(name)}",
                f"--num-cpus={CORES[name]}",
                f"--temp-dir={folder}/{name}",
            ]
            start = [
                "ray",
                "start",
                *role,
                *options,
                "--object-store-memory=80000000",
                "--include-log-monitor=false",
            ]
            _on(hosts, name, start, check=True)
        return _on(hosts, HEAD, [sys.executable, "-m", "bench.chaos", *sys.argv[1:]]).returncode


def _on(
    hosts: Hosts, name: str, command: list[str], check: bool = False
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["ip", "netns", "exec", hosts.space(name), *command], check=check)
