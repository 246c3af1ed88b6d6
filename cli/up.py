"""`pdserve up`: starts a cluster, shows its state, and ends it on Ctrl-C, SIGTERM or `pdserve down`.

The first signal drains, the second stops at once.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import grpc

from ..core.config import ClusterConfig
from ..core.log_settings import LogFormat, LogSettings
from ..proto import pdserve_pb2 as pb
from ..telemetry import logs
from ..telemetry.relay import LogRelay
from .admin import follow_drain
from .client import Client, CommandFailed, connect_locally, is_gone
from .interruptible import interruptible
from .progress import StartBars, StatusLines, is_ready, ready_line

if TYPE_CHECKING:
    from ..cluster.launch import LaunchedCluster

log = logging.getLogger(__name__)

MAX_RESTARTS = 2  # restarts of a worker before the wait for its start gives up
RESTART_TIMEOUT_S = 60.0  # for another head to take the place of one that died
END_TIMEOUT_S = 10.0  # from the last status to the end of the head


def up(config: ClusterConfig) -> None:
    """Serves until it is asked to end."""
    from .plan import check

    check(config)
    from ..cluster.launch import launch  # takes a second: it imports Ray

    with (
        logging_here(config) as settings,
        launch(config, settings) as cluster,
        sigterm_as_interrupt(),
        connect_locally(cluster) as client,
    ):
        try:
            follow(client, http_address=cluster.http_address)
            while _is_back(cluster, client):
                say("the head process died; another one has taken over its workers")
                follow(client, http_address=cluster.http_address)
        except KeyboardInterrupt:
            _drain_and_stop(client)
            return
        _check_end(cluster)


@contextmanager
def logging_here(config: ClusterConfig) -> Iterator[LogSettings]:
    """Routes the logs of all the cluster's processes to this one's stderr within the block."""
    asked = config.observability.log_format
    kind: LogFormat = asked if asked != "auto" else "console" if sys.stderr.isatty() else "json"
    with closing(LogRelay(sys.stderr)) as relay:
        settings = LogSettings(kind, config.observability.log_level, relay.path)
        with logs.configured(settings, "up"):
            say(f"starting {config.model.name}")
            yield settings


def follow(client: Client, until_ready: bool = False, http_address: str | None = None) -> None:
    """Say what changes, until the cluster ends or, with `until_ready`, until it serves: there, and over
    HTTP."""
    lines = StatusLines()
    try:
        with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
            has_started = _until_ready(
                client, states, lines, MAX_RESTARTS if until_ready else None, http_address
            )
            if has_started and not until_ready:
                for status in states:
                    _say_changes(lines, status)
    except grpc.RpcError as error:
        if not is_gone(error):
            raise


def _until_ready(
    client: Client,
    states: Iterable[pb.ClusterStatus],
    lines: StatusLines,
    max_restarts: int | None,
    http_address: str | None,
) -> bool:
    """Show how the start goes; whether it came to its end. Raises CommandFailed after `max_restarts` of a
    worker."""
    with StartBars() as bars:
        for status in states:
            if bars.are_shown:
                bars.update(status)
            else:
                _say_changes(lines, status)
            if is_ready(status):
                break
            for worker in status.workers:
                if max_restarts is not None and worker.num_restarts > max_restarts and worker.message:
                    raise CommandFailed(f"{worker.worker_id} does not start: {worker.message}")
        else:
            return False
    say(ready_line(status, client.address, http_address))
    return True


def _say_changes(lines: StatusLines, status: pb.ClusterStatus) -> None:
    for line in lines.changes(status):
        say(line)


def _is_back(cluster: "LaunchedCluster", client: Client) -> bool:
    """Returns whether another server replaces the one that is gone, as happens when nobody has ended it."""
    give_up_s = time.monotonic() + RESTART_TIMEOUT_S
    while not cluster.ended and time.monotonic() < give_up_s:
        try:
            return not client.cluster.GetStatus(pb.GetStatusRequest(), timeout=1.0).shutting_down
        except grpc.RpcError:
            time.sleep(0.05)
    return False


def _check_end(cluster: "LaunchedCluster") -> None:
    """Checks why the server is gone: fine when it was ended on purpose, an error when the head died."""
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
        follow_drain(client, pb.DrainRequest(shutdown=True), say)
        say("stopped")
    except KeyboardInterrupt:
        say("stopping at once")
    except grpc.RpcError as error:
        if not is_gone(error):
            raise


@contextmanager
def launched(config: ClusterConfig) -> Iterator["LaunchedCluster"]:
    """A cluster for the time of the block. A Ctrl-C while Ray starts, which cannot be interrupted cleanly,
    counts after it."""
    from ..cluster.launch import launch

    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        cluster = launch(config)
    finally:
        signal.signal(signal.SIGINT, before)
    with cluster, sigterm_as_interrupt():
        if interrupted:
            raise KeyboardInterrupt
        yield cluster


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
    """Prints to stderr: stdout belongs to answers."""
    if logs.are_json():
        log.info("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)
