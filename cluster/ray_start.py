"""Ray without those of its processes that a cluster of one host has no use for: the dashboard, the
autoscaler's monitor, and the reader of its logs. `ray.init` waits for the first, and has no option that
leaves one out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.node import Node

UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")  # methods of Ray's `Node`


@contextmanager
def without_unused_processes() -> Iterator[None]:
    """Within the block, Ray starts none of them. A Ray that calls them otherwise starts them."""
    methods = {name: getattr(Node, name) for name in UNUSED if hasattr(Node, name)}
    for name in methods:
        setattr(Node, name, _start_nothing)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def _start_nothing(node: Node, *_: Any, **__: Any) -> None:
    """Stands in for a method that starts a process."""
