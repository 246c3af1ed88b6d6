"""`pdserve up`: starts a cluster, shows its state, and ends it on Ctrl-C, SIGTERM or `pdserve down`.

The first signal drains, the second stops at once.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import grpc

from ..core.config import ClusterConfig
from ..core.log_settings import LogFormat, LogSettings
from ..proto import pdserve_pb2 as pb
from ..telemetry import logs
from ..telemetry.log_file import LogFile
from ..telemetry.relay import LogRelay
from .admin import follow_drain
from .client import Client, CommandFailed, connect_locally, is_gone
from .ending import ending_at_once
from .interruptible import interruptible
from .neighbours import neighbours
from .progress import MAX_RESTARTS, StartBars, StatusLines, check_starts, is_ready, ready_line

if TYPE_CHECKING:
    from ..cluster.launch import LaunchedCluster

log = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 60.0  # for another head to take the place of one that died
EXIT_INTERRUPTED = 128 + signal.SIGINT
END_TIMEOUT_S = 10.0  # from the last status to the end of the head


def up(config: ClusterConfig) -> None:
    """Serves until it is asked to end. An interrupt before it serves ends it at once, with status 130."""
    with ExitStack() as stack:
        with ending_at_once() as clean_ups:
            from .plan import check

            planned = check(config)
            kept = stack.enter_context(closing(LogFile()))
            clean_ups.append(kept.remove)
            settings = stack.enter_context(logging_here(config, clean_ups, kept))
            for line in neighbours(planned):
                say(line)
            cluster = stack.enter_context(_launched(config, settings, clean_ups))
            kept.publish(cluster.grpc_address)
        stack.enter_context(sigterm_as_interrupt())
        client = stack.enter_context(connect_locally(cluster))
        serving = threading.Event()
        try:
            follow(client, http_address=cluster.http_address, on_ready=serving.set)
            while _is_back(cluster, client):
                say("the head process died; another one has taken over its workers")
                follow(client, http_address=cluster.http_address, on_ready=serving.set)
        except KeyboardInterrupt:
            if not serving.is_set():
                say("interrupted")
                _stop_at_once(cluster)
                kept.remove()
                sys.exit(EXIT_INTERRUPTED)
            _drain_and_stop(client)
            return
        _check_end(cluster)


def _launched(
    config: ClusterConfig, settings: LogSettings | None, clean_ups: list[Callable[[], None]]
) -> "LaunchedCluster":
    from ..cluster import launch  # takes a second: it imports Ray

    clean_ups.append(launch.abandon)
    return launch.launch(config, settings)


def _stop_at_once(cluster: "LaunchedCluster") -> None:
    """Stops without draining; an interrupt meanwhile leaves the rest to the operating system."""
    from ..cluster.launch import abandon

    with ending_at_once() as clean_ups:
        clean_ups.append(abandon)
        cluster.stop()


@contextmanager
def logging_here(
    config: ClusterConfig, clean_ups: list[Callable[[], None]], kept: LogFile
) -> Iterator[LogSettings]:
    """Routes the logs of all the cluster's processes to this one's stderr, and to `kept`, within the block;
    `clean_ups` ends that in a process that ends at once."""
    asked = config.observability.log_format
    kind: LogFormat = asked if asked != "auto" else "console" if sys.stderr.isatty() else "json"
    with closing(LogRelay(sys.stderr, kept.write)) as relay:
        clean_ups.append(relay.close)
        settings = LogSettings(kind, config.observability.log_level, relay.path)
        with logs.configured(settings, "up"):
            say(f"starting {config.model.name}")
            yield settings


def follow(
    client: Client,
    until_ready: bool = False,
    http_address: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Say what changes, until the cluster ends or, with `until_ready`, until it serves: there, and over
    HTTP. `on_ready` is called when it does."""
    lines = StatusLines()
    try:
        with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
            has_started = _until_ready(
                client, states, lines, MAX_RESTARTS if until_ready else None, http_address, on_ready
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
    on_ready: Callable[[], None],
) -> bool:
    """Show how the start goes; whether it came to its end, where `on_ready` is called. Raises CommandFailed
    after `max_restarts` of a worker."""
    with StartBars() as bars:
        for status in states:
            if bars.are_shown:
                bars.update(status)
            else:
                _say_changes(lines, status)
            if is_ready(status):
                break
            if max_restarts is not None:
                check_starts(status, max_restarts)
        else:
            return False
    on_ready()
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
    """A cluster for the time of the block. An interrupt while it starts ends this process."""
    with ending_at_once() as clean_ups:
        cluster = _launched(config, None, clean_ups)
    with cluster, sigterm_as_interrupt():
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
