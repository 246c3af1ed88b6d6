"""`pdserve status`, `apply`, `drain` and `down`: the operator's commands for a running cluster."""

import time
from collections.abc import Callable
from pathlib import Path

import grpc
from rich.console import Console
from rich.live import Live

from ..core.bounded_file import read_bounded
from ..core.config_file import MAX_FILE_BYTES
from ..proto import pdserve_pb2 as pb
from .client import Client, CommandFailed, is_gone
from .interruptible import interruptible
from .progress import MAX_RESTARTS, StatusLines, check_starts, is_ready
from .status import as_json, as_table, as_text
from .terminal import show

GONE_TIMEOUT_S = 20.0


def show_status(client: Client, watch: bool, output: str) -> None:
    """Print the state, or follow it."""
    if not watch:
        status = client.cluster.GetStatus(pb.GetStatusRequest())
        show(as_json(status) if output == "json" else as_table(status, output == "wide"))
        return
    console = Console()
    with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
        if console.is_terminal and output != "json":
            with Live(console=console, auto_refresh=False, vertical_overflow="crop") as screen:
                for status in states:
                    screen.update(as_text(status, output == "wide", console.width), refresh=True)
            return
        for status in states:
            text = as_json(status, None) if output == "json" else as_table(status, output == "wide") + "\n"
            show(text)


def apply(client: Client, file: Path, dry_run: bool, wait: bool) -> None:
    """Print what changed, a line a key, and which drained workers start again; with `wait`, return when all
    instances are ready and none drains."""
    try:
        text = read_bounded(file, MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CommandFailed(f"{file}: cannot be read: {reason}") from error
    request = pb.ApplyRequest(config_yaml=text, filename=str(file), dry_run=dry_run)
    _change(client, lambda: client.cluster.Apply(request), dry_run, wait)


def scale(client: Client, changes: list[str], dry_run: bool, wait: bool) -> None:
    """Print what changed; `changes` are such as prefill=3 or decode=+1."""
    request = pb.ScaleRequest(pools=[_pool_scale(text) for text in changes], dry_run=dry_run)
    _change(client, lambda: client.cluster.Scale(request), dry_run, wait)


def _pool_scale(text: str) -> pb.PoolScale:
    """Parses POOL=N, POOL=+N or POOL=-N. Raises CommandFailed."""
    role, _, number = text.partition("=")
    digits = number.removeprefix("+").removeprefix("-")
    if not role or not (digits.isascii() and digits.isdigit() and len(digits) < 7):
        raise CommandFailed(f"{text!r}: expected a pool and its instances, such as prefill=3 or decode=+1")
    if number.startswith(("+", "-")):
        return pb.PoolScale(role=role, delta=int(number))
    return pb.PoolScale(role=role, instances=int(number))


def _change(client: Client, call: Callable[[], pb.ApplyResponse], dry_run: bool, wait: bool) -> None:
    drained = _drained(client.cluster.GetStatus(pb.GetStatusRequest()))
    response = call()
    for change in response.changes:
        show(f"{change.key}: {change.before} -> {change.after}")
    # an instance that was drained by hand is out of service until the next apply
    left = set() if dry_run else _drained(client.cluster.GetStatus(pb.GetStatusRequest()))
    for worker_id in sorted(drained - left):
        show(f"{worker_id}: drained -> {'would be replaced' if dry_run else 'replaced'}")
    if not response.changes and drained == left:
        print("nothing to change")
    if wait and not dry_run:
        _wait_until_settled(client)


def _drained(status: pb.ClusterStatus) -> set[str]:
    return {worker.worker_id for worker in status.workers if worker.state == pb.WORKER_STATE_DRAINED}


def _wait_until_settled(client: Client) -> None:
    """Says what changes, until every instance is ready and no other is left. Raises CommandFailed for a
    worker that does not start."""
    lines = StatusLines()
    with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
        for status in states:
            for line in lines.changes(status):
                show(line)
            if is_ready(status) and len(status.workers) == sum(pool.instances for pool in status.pools):
                return
            check_starts(status, MAX_RESTARTS)
    raise CommandFailed("the cluster has ended")


def drain(client: Client, worker_ids: list[str]) -> None:
    """Drain workers, or all; print how many requests are left."""
    follow_drain(client, pb.DrainRequest(worker_ids=worker_ids), show)
    print("drained")


def shut_down(client: Client) -> None:
    """Drain all workers and end the cluster; returns when nothing answers any more. Raises grpc.RpcError
    where no cluster runs."""
    client.cluster.GetStatus(pb.GetStatusRequest())
    try:
        follow_drain(client, pb.DrainRequest(shutdown=True), print)
    except grpc.RpcError as error:
        if not is_gone(error):
            raise
    give_up_s = time.monotonic() + GONE_TIMEOUT_S
    while time.monotonic() < give_up_s:
        try:
            client.cluster.GetStatus(pb.GetStatusRequest(), timeout=2.0)
        except grpc.RpcError as error:
            if is_gone(error):
                return
        time.sleep(0.1)
    raise CommandFailed(f"the cluster is drained, but its server at {client.address} still answers")


def follow_drain(client: Client, request: pb.DrainRequest, say: Callable[[str], None]) -> None:
    """Drain, and say how many requests are left whenever that changes."""
    last = 0
    with interruptible(client.cluster.Drain(request)) as steps:
        for progress in steps:
            left = progress.num_running_requests
            if left != last and not progress.done:
                say(f"draining: {left} request{'s' * (left != 1)} running")
            last = left
