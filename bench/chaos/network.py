"""A network that can be cut: here a network namespace of our own, whose loopback drops what crosses a
partition; `hosts.py` has one of several hosts.

Packets are classified by port (u32) into an HTB class whose queue is too short for any packet.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Protocol

INSIDE = "PDSERVE_ORDEAL_NAMESPACE"
SET_UP = """\
ip link set lo up
tc qdisc add dev lo root handle 1: htb default 1
tc class add dev lo parent 1: classid 1:1 htb rate 100gbit quantum 60000
tc class add dev lo parent 1: classid 1:2 htb rate 1gbit quantum 60000
tc qdisc add dev lo parent 1:2 bfifo limit 1
"""
_preferences = count(1)  # one for each cut, by which it is found again
ESTABLISHED, LISTEN = "01", "0A"  # as /proc/net/tcp writes them


class NetworkFaults(Protocol):
    """Cuts some processes off from others: what is sent between them is lost, and neither side gets an error.

    Both return what mends it, or None where there is nothing to cut. Both raise FileNotFoundError,
    ProcessLookupError or PermissionError when one of the processes has gone."""

    def cut_from_router(self, pids: Iterable[int], router: int) -> Callable[[], None] | None: ...

    def cut_from_peers(self, pids: Iterable[int], peers: Iterable[int]) -> Callable[[], None] | None: ...


class Loopback:
    """A network with all processes in one network namespace."""

    def cut_from_router(self, pids: Iterable[int], router: int) -> Callable[[], None] | None:
        return _cut(set().union(*(_client_ports(pid, router) for pid in pids)))

    def cut_from_peers(self, pids: Iterable[int], peers: Iterable[int]) -> Callable[[], None] | None:
        peers = list(peers)
        return _cut(set().union(*(_ports_towards(pid, peers) for pid in pids)))


def enter_namespace() -> None:
    """Run this program again in a network namespace of its own, unless it is in one. Takes root and
    `unshare`, `ip`, `tc`."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, "-m", "bench.chaos", *sys.argv[1:]])
    for line in SET_UP.splitlines():
        subprocess.run(line.split(), check=True)


def _sockets_of(pid: int) -> Iterator[tuple[str, int, int]]:
    """(state, local port, remote port) of a process's IPv4 TCP sockets."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            own.add(target[8:-1])
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_, inode = line.split()[:10]
        if inode in own:
            yield state, int(local.split(":")[1], 16), int(remote.split(":")[1], 16)


def _client_ports(pid: int, server: int) -> set[int]:
    """Ports of `pid`'s ends of the connections that it opened to `server`."""
    served = _listening_ports(server)
    return {local for state, local, remote in _sockets_of(pid) if state == ESTABLISHED and remote in served}


def _ports_towards(pid: int, peers: Iterable[int]) -> set[int]:
    """Ports of `pid` by which any of `peers` talks to it, or could begin to."""
    theirs = {
        (local, remote)
        for peer in peers
        for state, local, remote in _sockets_of(peer)
        if state == ESTABLISHED
    }
    ours = {
        local
        for state, local, remote in _sockets_of(pid)
        if state == ESTABLISHED and (remote, local) in theirs
    }
    return ours | _listening_ports(pid)


def _listening_ports(pid: int) -> set[int]:
    return {local for state, local, _ in _sockets_of(pid) if state == LISTEN}


def _cut(ports: set[int]) -> Callable[[], None] | None:
    """Drops all packets from or to these ports from now on."""
    if not ports:
        return None
    preference = next(_preferences)
    for port in ports:
        for side in ("sport", "dport"):
            rule = (
                f"tc filter add dev lo parent 1: protocol ip pref {preference} u32 match ip {side} {port}"
                " 0xffff flowid 1:2"
            )
            subprocess.run(rule.split(), check=True)
    return lambda: _mend(preference)


def _mend(preference: int) -> None:
    subprocess.run(f"tc filter del dev lo parent 1: pref {preference}".split(), check=True)
