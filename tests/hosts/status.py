"""Reads `pdserve status` on the head's host."""

import json
import time
from collections.abc import Callable
from typing import Any

from .network import Hosts

SETTLE_S = 120.0
Status = dict[str, Any]


def await_status(hosts: Hosts, holds: Callable[[Status], bool]) -> Status:
    """The first one that holds."""
    due_s = time.monotonic() + SETTLE_S
    while not holds(status := json.loads(hosts.run("head", "pdserve status -o json"))):
        assert time.monotonic() < due_s, status
    return status


def states(status: Status) -> dict[str, str]:
    """The state of each host, by address."""
    return {host["address"]: host["state"].removeprefix("HOST_STATE_") for host in status["hosts"]}


def is_whole(status: Status) -> bool:
    """Every host has joined, and every instance that the file asks for is ready."""
    pools = all(pool.get("ready", 0) == pool["instances"] for pool in status["pools"])
    return pools and set(states(status).values()) == {"JOINED"}
