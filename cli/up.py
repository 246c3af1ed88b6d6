"""`pdserve up`: starts a cluster, shows how it fares, and ends it on Ctrl-C, SIGTERM or `pdserve down`.

The first signal drains, the second stops at once.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import grpc

from ..core.config import ClusterConfig
from ..proto import pdserve_pb2 as pb
from .client import Client, CommandFailed, connect, is_gone
from .progress import StatusLines, is_ready, ready_line

if TYPE_CHECKING:
    from ..cluster.launch import LaunchedCluster

END_TIMEOUT_S = 10.0  # from the last status to the end of the head


def up(config: ClusterConfig) -> None:
    """Serve until told to end."""
    from ..cluster.launch import launch

    say(f"starting {config.model.name}")
    with launch(config) as cluster, sigterm_as_interrupt(), connect(cluster.grpc_address) as client:
        try:
            follow(client)
        except KeyboardInterrupt:
            _drain_and_stop(client)
            return
        _check_end(cluster)


def follow(client: Client, until_ready: bool = False) -> None:
    """Say what changes, until the cluster ends or, with `until_ready`, until it serves."""
    lines, was_ready = StatusLines(), False
    try:
        for status in client.cluster.WatchStatus(pb.WatchStatusRequest()):
            for line in lines.changes(status):
                say(line)
            if is_ready(status) and not was_ready:
                was_ready = True
                say(ready_line(status, client.address))
                if until_ready:
                    return
    except grpc.RpcError as error:
        if not is_gone(error):
            raise


def _check_end(cluster: "LaunchedCluster") -> None:
    """The server is gone: fine when somebody ended it, an error when the head died."""
    give_up_s = time.monotonic() + END_TIMEOUT_S
    while not cluster.ended and time.monotonic() < give_up_s:
        time.sleep(0.05)
    error = cluster.poll()
    if error is not None:
        raise CommandFailed(error)
    say("stopped")


def _drain_and_stop(client: Client) -> None:
    say("draining; interrupt again to stop at once")
    try:
        for progress in client.cluster.Drain(pb.DrainRequest(shutdown=True)):
            if not progress.done and progress.num_running_requests:
                say(f"draining: {progress.num_running_requests} running")
    except KeyboardInterrupt:
        say("stopping at once")
    except grpc.RpcError as error:
        if not is_gone(error):
            raise


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does. Ray sets a handler of its own when it starts, so this comes after."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """To stderr: stdout belongs to answers."""
    print(line, file=sys.stderr, flush=True)
