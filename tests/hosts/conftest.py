"""A network of hosts for each module that asks for one."""

import os
from collections.abc import Iterator

import pytest

from .network import Hosts, whats_missing


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """operator, head, worker1, worker2."""
    if reason := whats_missing():
        pytest.skip(reason)
    with Hosts(f"t{os.getpid()}") as network:
        network.up(["operator", "head", "worker1", "worker2"])
        yield network
