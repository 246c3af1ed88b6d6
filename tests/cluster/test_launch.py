"""Launches and workers that fail: they report why concisely, and leave nothing behind or come back."""

import os
import shutil
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
from pdserve.embedded import MODEL_DIR
from pdserve.head.spec import HeadSpec
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

from ..other_user import run_as_nobody
from .harness import Cluster, tokens_of

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"path": "/nowhere"}}, r"^/nowhere: no such file or directory"),
        ({"pools": {"prefill": {"instances": 400}}}, r"core"),
    ],
)
def test_an_infeasible_configuration_is_not_launched(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        launch(ClusterConfig.model_validate(settings | {"listen": {"grpc": "127.0.0.1:0", "http": None}}))
    assert "Traceback" not in str(caught.value)


def test_an_abandoned_cluster_is_gone_from_a_ray_that_stays() -> None:
    listen = {"grpc": "127.0.0.1:0", "http": None}
    cluster = launch(ClusterConfig.model_validate({"listen": listen}))
    link = admin_socket.socket_link(cluster.grpc_address)
    assert link.is_symlink()
    cluster.abandon()
    assert not link.is_symlink()
    cluster._over.wait(30.0)
    assert cluster.ended and cluster.poll() is None
    launch(ClusterConfig.model_validate({"listen": listen})).stop()


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


def test_the_command_line_finds_a_running_cluster_by_its_address() -> None:
    cluster = Cluster("embedded")
    try:
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
    finally:
        cluster.close()
    assert not admin_socket.socket_link(cluster.address).is_symlink()


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


def test_a_worker_that_cannot_load_reports_why_until_the_checkpoint_is_repaired(tmp_path: Path) -> None:
    path = shutil.copytree(MODEL_DIR, tmp_path / "model")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    cluster = Cluster(path)
    try:
        expected = tokens_of(cluster.stream(cluster.request("import this")))
        weights.write_bytes(whole[:-1000])
        decode = next(w for w in cluster.admin.GetStatus(pb.GetStatusRequest()).workers if w.role == "decode")
        os.kill(decode.pid, signal.SIGKILL)
        for status in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
            if "truncated" in status.workers[0].message:
                break
        assert status.workers[0].state == pb.WORKER_STATE_FAILED
        # the prefill worker stands in
        assert tokens_of(cluster.stream(cluster.request("import this"))) == expected
        weights.write_bytes(whole)
        cluster.wait_for(prefill=1, decode=1)
    finally:
        cluster.close()
