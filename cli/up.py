"""`pdserve up`: starts a cluster, shows its state, and ends it on Ctrl-C, SIGTERM or `pdserve down`.

The first signal drains, the second stops at once.
"""

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
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
from .screen import Screen

if TYPE_CHECKING:
    from ..cluster.launch import LaunchedCluster

log = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 60.0  # for another head to take the place of one that died
END_TIMEOUT_S = 30.0  # from the last status to the end of the head


def up(config: ClusterConfig) -> None:
    """Serves until it is asked to end. An interrupt before it serves ends it at once, with status 130."""
    with ExitStack() as stack:
        starting = stack.enter_context(ExitStack())
        clean_ups = starting.enter_context(ending_at_once())

        def serve() -> None:
            starting.close()
            stack.enter_context(sigterm_as_interrupt())

        from .plan import check

        planned = check(config)
        kept = stack.enter_context(closing(LogFile()))
        clean_ups.append(kept.remove)
        screen = stack.enter_context(Screen(say))
        clean_ups.append(screen.abandon)
        settings = stack.enter_context(logging_here(config, clean_ups, kept, screen))
        for line in neighbours(planned):
            say(line)
        cluster = stack.enter_context(_launched(config, settings, clean_ups, screen))
        starting.enter_context(ending_at_once(clean_ups))  # Ray has put a handler of its own for SIGTERM
        kept.publish(cluster.grpc_address)
        client = stack.enter_context(connect_locally(cluster))
        shown = Shown(cluster.http_address, planned.weights_bytes, clean_ups)
        try:
            follow(client, shown, on_ready=serve)
            while _is_back(cluster, client):
                say("the head process died; another one has taken over its workers")
                follow(client, shown, on_ready=serve)
        except KeyboardInterrupt:
            _drain_and_stop(client)
            return
        _check_end(cluster)


def _launched(
    config: ClusterConfig, settings: LogSettings | None, clean_ups: list[Callable[[], None]], screen: Screen
) -> "LaunchedCluster":
    from ..cluster import launch  # takes a second: it imports Ray

    clean_ups.append(launch.abandon)
    with screen:
        return launch.launch(config, settings, screen.begin)


@contextmanager
def logging_here(
    config: ClusterConfig, clean_ups: list[Callable[[], None]], kept: LogFile, screen: Screen
) -> Iterator[LogSettings]:
    """Routes the logs of all the cluster's processes to `screen` and `kept` within the block; `clean_ups`
    ends that in a process that ends at once."""
    asked = config.observability.log_format
    kind: LogFormat = asked if asked != "auto" else "console" if sys.stderr.isatty() else "json"
    with closing(LogRelay(screen, kept.write)) as relay:
        clean_ups.append(relay.close)
        settings = LogSettings(kind, config.observability.log_level, relay.path)
        with logs.configured(settings, "up"):
            say(f"starting {config.model.name}")
            yield settings


@dataclass(frozen=True)
class Shown:
    """The lines of a start beside the workers' states. `clean_ups` ends it in a process that ends at once."""

    http_address: str | None = None
    weights_bytes: int | None = None  # what each instance loads
    clean_ups: list[Callable[[], None]] = field(default_factory=list)


def follow(
    client: Client,
    shown: Shown,
    until_ready: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Say what changes, until the cluster ends or, with `until_ready`, until it serves. `on_ready` is called
    when it does."""
    lines = StatusLines(shown.weights_bytes)
    try:
        with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
            ready = _until_ready(states, lines, shown, MAX_RESTARTS if until_ready else None)
            if ready is None:
                return
            on_ready()
            say(ready_line(ready, client.address, shown.http_address))
            if not until_ready:
                for status in states:
                    _say_changes(lines, status)
    except grpc.RpcError as error:
        if not is_gone(error):
            raise


def _until_ready(
    states: Iterable[pb.ClusterStatus], lines: StatusLines, shown: Shown, max_restarts: int | None
) -> pb.ClusterStatus | None:
    """Show how the start goes; returns the state in which all instances are ready, None if it ends before.
    Raises CommandFailed after `max_restarts` of a worker."""
    with StartBars(shown.weights_bytes) as bars:
        shown.clean_ups.append(bars.stop)
        for status in states:
            if bars.are_shown:
                bars.update(status)
            else:
                _say_changes(lines, status)
            if is_ready(status):
                return status
            if max_restarts is not None:
                check_starts(status, max_restarts)
    return None


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
    """Checks why the server is gone: fine when it was ended on purpose, an error when the head died, or none
    has taken its place."""
    give_up_s = time.monotonic() + END_TIMEOUT_S
    while not cluster.ended and time.monotonic() < give_up_s:
        time.sleep(0.05)
    error = cluster.poll()
    if error is None and not cluster.ended:
        error = f"the head is gone, and no other has served within {RESTART_TIMEOUT_S + END_TIMEOUT_S:.0f} s"
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
def serving(config: ClusterConfig) -> Iterator[Client]:
    """A client of a cluster that serves for the time of the block. An interrupt before it serves ends this
    process at once. Raises CheckpointError, ConfigError, CapacityError or LaunchError."""
    with ExitStack() as stack:
        starting = stack.enter_context(ExitStack())
        clean_ups = starting.enter_context(ending_at_once())

        from .plan import check

        planned = check(config)
        screen = stack.enter_context(Screen(say))
        clean_ups.append(screen.abandon)
        cluster = stack.enter_context(_launched(config, None, clean_ups, screen))
        starting.enter_context(ending_at_once(clean_ups))  # as in `up`
        client = stack.enter_context(connect_locally(cluster))
        shown = Shown(weights_bytes=planned.weights_bytes, clean_ups=clean_ups)
        follow(client, shown, until_ready=True)
        starting.close()
        stack.enter_context(sigterm_as_interrupt())
        yield client


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
