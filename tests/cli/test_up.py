"""The output of `pdserve up` while a cluster starts, serves and ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pdserve.cli import progress, up as up_command
from pdserve.cli.client import CommandFailed, connect_to_administer
from pdserve.cli.progress import StartBars, StatusLines, is_ready, ready_line
from pdserve.cli.up import Shown, follow, sigterm_as_interrupt, up
from pdserve.cluster import launch
from pdserve.core.config import ClusterConfig
from pdserve.core.log_settings import LogSettings
from pdserve.core.status import WorkerState
from pdserve.proto import pdserve_pb2 as pb
from tests.cli.conftest import ServerThread


def status(*workers: pb.WorkerStatus) -> pb.ClusterStatus:
    return pb.ClusterStatus(workers=workers)


def starting(phase: str, fraction: float) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        worker_id="decode-0", state=pb.WORKER_STATE_STARTING, phase=phase, fraction=fraction
    )


def test_a_message_with_brackets_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name a tensor, and so what the author of a checkpoint likes."""
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(progress, "Console", lambda file: console)
    failed = pb.WorkerStatus(worker_id="decode-0", state=pb.WORKER_STATE_FAILED, message="a[/b] [red]c")
    with StartBars() as bars:
        bars.update(status(failed))
    assert "a[/b] [red]c" in shown.getvalue()


def test_only_changes_make_a_line() -> None:
    lines = StatusLines()
    assert list(lines.changes(status(starting("loading weights", 0.0)))) == [
        "decode-0: starting, loading weights (0%)"
    ]
    assert list(lines.changes(status(starting("loading weights", 0.1)))) == []
    assert list(lines.changes(status(starting("loading weights", 0.5)))) == [
        "decode-0: starting, loading weights (50%)"
    ]
    ready = pb.WorkerStatus(worker_id="decode-0", state=pb.WORKER_STATE_READY)
    assert list(lines.changes(status(ready))) == ["decode-0: ready"]
    assert list(lines.changes(status(ready))) == []
    failed = pb.WorkerStatus(worker_id="decode-0", state=pb.WORKER_STATE_FAILED, message="the process died")
    assert list(lines.changes(status(failed))) == ["decode-0: failed, the process died"]
    assert list(lines.changes(status())) == ["decode-0: gone"]


def test_a_worker_that_loads_shows_how_much_of_its_weights() -> None:
    (line,) = StatusLines(weights_bytes=400 << 20).changes(status(starting("loading weights", 0.25)))
    assert line == "decode-0: starting, loading weights, 100 MiB of 400 MiB"


def test_missing_workers_and_the_end_are_each_reported_once() -> None:
    lines = StatusLines()
    lacks = "host 10.0.0.2: has not joined; waiting for it"
    assert list(lines.changes(pb.ClusterStatus(degraded=lacks))) == []
    assert list(lines.changes(pb.ClusterStatus(degraded=lacks, serving=True))) == [f"serving; {lacks}"]
    assert list(lines.changes(pb.ClusterStatus(degraded=lacks, serving=True))) == []
    assert list(lines.changes(pb.ClusterStatus(serving=True))) == ["serving as configured"]


def test_a_cluster_is_ready_when_every_configured_instance_is() -> None:
    pools = [
        pb.PoolStatus(role="prefill", instances=2, ready=2),
        pb.PoolStatus(role="decode", instances=1, ready=0),
    ]
    assert not is_ready(pb.ClusterStatus(pools=pools))
    pools[1].ready = 1
    assert is_ready(pb.ClusterStatus(pools=pools))


def test_following_says_when_it_serves_and_ends_with_the_cluster(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = tuple(replace(worker, state=WorkerState.READY) for worker in server.cluster.state.workers)
    server.call(lambda: server.cluster.change(workers=workers, shutting_down=True))
    with connect_to_administer(server.address) as client:
        follow(client, Shown())
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prefill-0: ready",
        "decode-0: ready",
        f"ready: tiny at {server.address}, 1 prefill and 1 decode instances",
    ]


def test_following_until_ready_returns_while_the_cluster_serves(server: ServerThread) -> None:
    workers = tuple(replace(worker, state=WorkerState.READY) for worker in server.cluster.state.workers)
    server.call(lambda: server.cluster.change(workers=workers))
    with connect_to_administer(server.address) as client:
        follow(client, Shown(), until_ready=True)
    assert not server.cluster.state.shutting_down


def test_a_start_gives_up_on_a_worker_that_keeps_failing(server: ServerThread) -> None:
    worker = replace(
        server.cluster.state.workers[1], state=WorkerState.FAILED, message="no memory", num_restarts=3
    )
    server.call(lambda: server.cluster.change(workers=(worker,)))
    with (
        connect_to_administer(server.address) as client,
        pytest.raises(CommandFailed, match="decode-0 does not start: no memory"),
    ):
        follow(client, Shown(), until_ready=True)


def test_a_server_that_goes_away_ends_following(server: ServerThread) -> None:
    server.stop_when_watched()
    with connect_to_administer(server.address) as client:
        follow(client, Shown())


UP = """
import signal, sys
from contextlib import nullcontext
from types import SimpleNamespace
from pdserve.cli.up import Shown, up
from pdserve.cluster import launch
from pdserve.core.config import ClusterConfig

address, local_address = sys.argv[1:]
launched = SimpleNamespace(grpc_address=address, local_address=local_address, http_address=None, ended=True, poll=lambda: None, stop=lambda: None)
launch.launch = lambda config, settings, on_step: nullcontext(launched)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
up(ClusterConfig.model_validate({"observability": {"log_format": "console"}}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_cluster_and_ends_it(server: ServerThread, number: int) -> None:
    """Runs in a process of its own, whose main thread the signal interrupts."""
    workers = tuple(replace(worker, state=WorkerState.READY) for worker in server.cluster.state.workers)
    server.call(lambda: server.cluster.change(workers=workers))
    server.call(server.cluster.go_on.set)
    command = [sys.executable, "-c", UP, server.address, server.local_address]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("ready:") for line in process.stderr), "it follows the cluster"
        process.send_signal(number)
        assert process.stderr.read().splitlines()[-2:] == [
            "draining; interrupt again to stop at once",
            "stopped",
        ]
    assert process.returncode == 0
    assert server.cluster.drained == [((), True)]


def test_an_interrupt_before_the_cluster_is_ready_stops_at_once(server: ServerThread) -> None:
    command = [sys.executable, "-c", UP, server.address, server.local_address]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("decode-") for line in process.stderr), "it follows the cluster"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().splitlines() == ["interrupted"]
    assert process.returncode == 130
    assert server.cluster.drained == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_is_not_lost_where_exceptions_are(server: ServerThread, number: int) -> None:
    """Python drops exceptions that are raised in destructors and callbacks, also a KeyboardInterrupt."""
    dropping = UP.replace("launch.launch", "from pdserve.cli import up as command\nlaunch.launch").replace(
        "up(Cl", "command.is_ready = lambda status: Dropping() and False\nup(Cl"
    )
    code = f"""
class Dropping:
    def __del__(self):
        print("in a destructor", file=sys.stderr, flush=True)
        signal.pause()
{dropping}"""
    command = [sys.executable, "-c", code, server.address, server.local_address]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    ) as process:
        assert process.stderr is not None
        assert any(line == "in a destructor\n" for line in process.stderr)
        process.send_signal(number)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 128 + number


def test_sigterm_is_an_interrupt_for_a_while_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_both_addresses_are_shown_when_there_are_two() -> None:
    assert ready_line(pb.ClusterStatus(model="m"), "127.0.0.1:1", "127.0.0.1:2").startswith(
        "ready: m at 127.0.0.1:1 (gRPC) and http://127.0.0.1:2/v1, "
    )


def test_where_no_terminal_is_every_line_is_a_json_object(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[LogSettings] = []

    def fake_launch(config: ClusterConfig, settings: LogSettings, on_step: Callable[[str], None]) -> Any:
        on_step("starting Ray")
        seen.append(settings)
        return nullcontext(
            SimpleNamespace(
                grpc_address=server.address,
                local_address=server.local_address,
                http_address=None,
                ended=True,
                poll=lambda: None,
            )
        )

    monkeypatch.setattr(launch, "launch", fake_launch)
    server.stop_when_watched()
    up(ClusterConfig())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    messages = [line["message"] for line in lines]
    assert [*messages[:2], messages[-1]] == ["starting embedded", "starting Ray", "stopped"]
    assert {line["process"] for line in lines} == {"up"}
    assert (seen[0].format, seen[0].level) == ("json", "info")
    assert not Path(seen[0].relay or "").exists(), "the socket is gone with the process that listened there"


@pytest.mark.parametrize(
    ("ended", "error", "refusal"),
    [
        (True, None, None),
        (True, "the head died", "the head died"),
        (False, None, "the head is gone, and no other has served within 60 s"),
    ],
)
def test_a_head_that_is_gone_counts_as_stopped_only_where_it_was_ended(
    ended: bool, error: str | None, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor would not start it again otherwise."""
    monkeypatch.setattr(up_command, "END_TIMEOUT_S", 0.0)
    cluster: Any = SimpleNamespace(ended=ended, poll=lambda: error)
    with nullcontext() if refusal is None else pytest.raises(CommandFailed, match=refusal):
        up_command._check_end(cluster)
