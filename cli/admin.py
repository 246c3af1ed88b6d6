"""`pdserve status`, `apply`, `drain` and `down`: the operator's commands for a running cluster."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from ..proto import pdserve_pb2 as pb
from .client import Client, CommandFailed, is_gone
from .interruptible import interruptible
from .status import as_json, as_table

GONE_TIMEOUT_S = 20.0


def show_status(client: Client, watch: bool, output: str) -> None:
    """Print the state, or follow it."""
    if not watch:
        status = client.cluster.GetStatus(pb.GetStatusRequest())
        print(as_json(status) if output == "json" else as_table(status, output == "wide"))
        return
    on_terminal = sys.stdout.isatty() and output != "json"
    with interruptible(client.cluster.WatchStatus(pb.WatchStatusRequest())) as states:
        for status in states:
            text = (
                as_json(status, indent=None)
                if output == "json"
                else as_table(status, output == "wide") + "\n"
            )
            print("\x1b[H\x1b[2J" + text if on_terminal else text, flush=True)


def apply(client: Client, file: Path, dry_run: bool) -> None:
    """Print what changed, a line a key."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CommandFailed(f"{file}: cannot be read: {reason}") from error
    response = client.cluster.Apply(pb.ApplyRequest(config_yaml=text, filename=str(file), dry_run=dry_run))
    for change in response.changes:
        print(f"{change.key}: {change.before} -> {change.after}")
    if not response.changes:
        print("nothing to change")


def drain(client: Client, worker_ids: list[str]) -> None:
    """Drain workers, or all; print how many requests are left."""
    follow_drain(client, pb.DrainRequest(worker_ids=worker_ids), print)
    print("drained")


def shut_down(client: Client) -> None:
    """Drain all workers and end the cluster; returns when nothing answers any more."""
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
