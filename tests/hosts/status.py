"""Follows `pdserve status` on the head's host: one process, since hosts of namespaces share few cores."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .network import BUSY_S, Hosts

Status = dict[str, Any]


def await_status(hosts: Hosts, holds: Callable[[Status], bool]) -> Status:
    """The first one that holds. When the head dies, as of a machine's full memory, another takes its place."""
    due_s = time.monotonic() + BUSY_S
    status: Status | None = None
    while True:
        for status in _statuses(hosts):
            if holds(status):
                return status
            assert time.monotonic() < due_s, status
        assert time.monotonic() < due_s, f"no head answers, after {status}"


def _statuses(hosts: Hosts) -> Iterator[Status]:
    command = hosts.command("head", "exec pdserve status --watch -o json 2> /dev/null")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        try:
            for line in watching.stdout:
                yield json.loads(line)
        finally:
            watching.kill()


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long it took."""
    began_s = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began_s:.1f} s")


def states(status: Status) -> dict[str, str]:
    """The state of each host, by address."""
    return {host["address"]: host["state"].removeprefix("HOST_STATE_") for host in status["hosts"]}


def is_whole(status: Status) -> bool:
    """Every host has joined, and every instance that the file asks for is ready."""
    pools = all(pool.get("ready", 0) == pool["instances"] for pool in status["pools"])
    return pools and set(states(status).values()) == {"JOINED"}
