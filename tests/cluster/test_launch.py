"""Launches and workers that fail: they report why concisely, and leave nothing behind or come back."""

import logging
import os
import signal
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError
from typer.testing import CliRunner

from pdserve.cli.main import app
from pdserve.cluster.errors import LaunchError
from pdserve.cluster.launch import LaunchedCluster, launch
from pdserve.core import admin_socket
from pdserve.core.config import ClusterConfig
from pdserve.head.spec import HeadSpec
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

from ..other_user import run_as_nobody
from .harness import ADMIN_WITH_KEY, Clusters, process_of, tokens_of

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"path": "/nowhere"}}, r"^/nowhere: no such file or directory"),
        ({"pools": {"prefill": {"instances": 400}}}, r"core"),
    ],
)
def test_an_infeasible_configuration_is_not_launched(
    settings: dict[str, object], message: str, no_cluster: None
) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        launch(ClusterConfig.model_validate(settings | {"listen": {"grpc": "127.0.0.1:0", "http": None}}))
    assert "Traceback" not in str(caught.value)


def test_a_head_that_cannot_start_tries_again_and_says_why(
    own_model: Path, clusters: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, away = own_model, own_model.with_name("away")
    has_failed = threading.Event()
    said: list[str] = []

    def error(text: str, *values: object) -> None:
        said.append(text % values)
        if away.exists():
            away.rename(model)
        has_failed.set()

    monkeypatch.setattr(logging.getLogger("pdserve.cluster.launch"), "error", error)
    cluster = clusters.get(model)
    before = cluster.pids()
    model.rename(away)
    os.kill(process_of("HeadActor"), signal.SIGKILL)
    assert has_failed.wait(240.0)
    assert cluster.pids() == before, "workers went on"
    assert str(model) in said[0]


def test_a_worker_that_cannot_load_reports_why_until_the_checkpoint_is_repaired(
    own_model: Path, clusters: Clusters
) -> None:
    weights = own_model / "model.safetensors"
    whole = weights.read_bytes()
    cluster = clusters.get(own_model)
    expected = tokens_of(cluster.stream(cluster.request("import this")))
    (decode,) = cluster.workers("decode")
    weights.write_bytes(whole[:-1000])
    try:
        os.kill(decode.pid, signal.SIGKILL)
        for status in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
            (decode,) = (worker for worker in status.workers if worker.role == "decode")
            if "truncated" in decode.message:
                break
        assert decode.state == pb.WORKER_STATE_FAILED
        # the prefill worker stands in
        assert tokens_of(cluster.stream(cluster.request("import this"))) == expected
    finally:
        weights.write_bytes(whole)
    cluster.wait_for(prefill=1, decode=1)


def test_an_abandoned_cluster_is_gone_from_a_ray_that_stays(own_model: Path, clusters: Clusters) -> None:
    cluster = clusters.take(path=own_model)
    link = admin_socket.socket_link(cluster.address)
    assert link.is_symlink()
    cluster.abandon()
    assert not link.is_symlink()
    cluster._launched._over.wait(60.0)
    assert cluster._launched.ended and cluster._launched.poll() is None
    assert clusters.get(listen=ADMIN_WITH_KEY).address


def test_a_launch_interrupted_while_ray_starts_leaves_no_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(**options: Any) -> None:
        assert Path(options["_temp_dir"]).parent.is_dir()
        assert options["address"] == "local", "no other Ray is looked for"
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", interrupted)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path / "ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    with pytest.raises(KeyboardInterrupt):
        launch(ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0", "http": None}}))
    assert list(tmp_path.iterdir()) == []


def test_a_squatted_runtime_folder_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runtime").symlink_to(tmp_path)
    monkeypatch.setenv(admin_socket.RUNTIME_FOLDER, str(tmp_path / "runtime"))
    with pytest.raises(admin_socket.UnsafeFolder, match=admin_socket.RUNTIME_FOLDER):
        launch(ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0", "http": None}}))


def test_the_command_line_finds_a_running_cluster_by_its_address(clusters: Clusters) -> None:
    cluster = clusters.get(listen=ADMIN_WITH_KEY)
    port = int(cluster.address.rpartition(":")[2])
    for host in ("127.0.0.1", "localhost"):
        result = CliRunner().invoke(app, ["status", "--address", f"{host}:{port}"])
        assert result.exit_code == 0 and "worker-0" in result.stdout, result.output
    with (
        grpc.insecure_channel(cluster.address) as channel,
        pytest.raises(grpc.RpcError, match=r"admin_without_key"),
    ):
        rpc.ClusterStub(channel).GetStatus(pb.GetStatusRequest())
    said = run_as_nobody(
        "attempt('connect', lambda: connect(sys.argv[1]))", str(admin_socket.find(cluster.address))
    )
    assert said == ["connect EACCES"]


def test_a_cluster_ends_with_an_error_when_the_raylet_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user of the host can make a raylet crash. A successor of the head would wait for it for ever."""
    cluster = LaunchedCluster.__new__(LaunchedCluster)
    cluster._stopped, cluster._over, cluster._error = False, threading.Event(), None
    cluster._stopping = threading.Event()
    cluster._keeper = SimpleNamespace(live=SimpleNamespace(remote=lambda: "keeper"))
    cluster._head = SimpleNamespace(wait=SimpleNamespace(remote=lambda: "head"))

    def get(reference: str, timeout: float | None = None) -> None:
        raise GetTimeoutError if reference == "keeper" else RayActorError

    killed: list[object] = []
    monkeypatch.setattr(ray, "wait", lambda references: None)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "this", "Alive": False}])
    monkeypatch.setattr("pdserve.cluster.launch._this_node", lambda: "this")
    cluster._supervise()
    assert "Ray has declared this host dead" in (cluster.poll() or "") and cluster.ended
    assert killed == [cluster._head]


def test_a_head_declared_dead_is_killed_before_its_successor_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    cluster = LaunchedCluster.__new__(LaunchedCluster)
    cluster._lock, cluster._stopped = threading.Lock(), False
    cluster._spec, cluster._endpoints = HeadSpec(token="secret", host=None), None
    start = SimpleNamespace(remote=lambda: None)
    cluster._head = SimpleNamespace(name="old", start=start)

    def create_head() -> None:
        cluster._head = SimpleNamespace(name="new", start=start)
        done.append("new head made")

    monkeypatch.setattr(cluster, "_create_head", create_head)
    monkeypatch.setattr(ray, "kill", lambda head: done.append(f"{head.name} head killed"))
    monkeypatch.setattr(ray, "get", lambda reference: None)
    cluster._replace_head()
    assert done == ["old head killed", "new head made"]
