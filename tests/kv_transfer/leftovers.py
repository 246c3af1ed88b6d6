"""Checks that tests of endpoints leave no resources behind: fixtures for the modules that have such tests."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.core.request import TransferId

from .support import WAIT_S, pair

TRANSPORTS = ("shm", "gloo")
T = TransferId("request", 0)


def open_things() -> tuple[int, int, int]:
    """Lists file descriptors, threads and staging rings of this process."""
    gc.collect()
    rings = Path("/proc/self/maps").read_text().count("pdserve-kv")
    threads = [t for t in threading.enumerate() if t.name.startswith(("pdserve", "asyncio"))]
    return len(os.listdir("/proc/self/fd")), len(threads), rings


@pytest.fixture(scope="module", autouse=True)
def _gloo_is_warm() -> None:
    """Torch takes longer to import than a pair may take to connect, and its first store opens two descriptors
    permanently."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    TCPStore("127.0.0.1", 0, 1, True)
    with pair(transport="gloo") as (sender, receiver):
        receiver.expect(T, sender.key, [0], 1)
        sender.push(T, receiver.address, [0], 1)
        receiver.ends.received(T)


@pytest.fixture(autouse=True)
def _nothing_is_left(_gloo_is_warm: None) -> Iterator[None]:
    before, threads = open_things(), set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("pdserve"):
            thread.join(WAIT_S)  # one that has been let go ends by itself
    after = open_things()  # what earlier tests had left to end by itself may have ended meanwhile
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
