"""From a configuration to a running head: finds or starts Ray, starts the head actor in it, and ends what it started.

The cluster lives as long as the process that launched it.
"""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import ClusterConfig
from ..core.errors import ConfigError, PdserveError
from ..engine.gpu import probe_node
from .actors import HEAD_NAME, NAMESPACE, HeadActor, reason_of
from .head import HeadSpec

OBJECT_STORE_BYTES = 80 << 20  # Ray's least: nothing of ours goes through it
DOOR = "pdserve.gateway.app:open_door"


class LaunchError(PdserveError):
    """The cluster could not be started."""


@dataclass(frozen=True)
class _Ray:
    """A Ray cluster we are connected to. `temp_dir` is set when we started it, `ours` when we connected to it."""

    temp_dir: Path | None
    ours: bool = True

    @staticmethod
    def connect() -> "_Ray":
        """Adopt the cluster that this process, this machine or RAY_ADDRESS knows, else start one of our own."""
        if ray.is_initialized():
            return _Ray(None, ours=False)
        options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS") or Path("/tmp/ray/ray_current_cluster").exists():
            try:
                ray.init(address="auto", **options)
                return _Ray(None)
            except ConnectionError as error:
                if os.environ.get("RAY_ADDRESS"):
                    raise LaunchError(f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
        return _Ray._start(options)

    @staticmethod
    def _start(options: dict[str, Any]) -> "_Ray":
        started = _Ray(Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp")))  # short: Ray's socket paths lie below it
        try:
            ray.init(
                num_cpus=len(probe_node().cores),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(started.temp_dir),
                _system_config={"worker_niceness": 0},  # Ray would let any other process of the machine starve ours
                **options,
            )
        except BaseException:  # Ctrl-C as well
            started.disconnect()
            raise
        return started

    def disconnect(self) -> None:
        if self.ours:
            ray.shutdown()
        if self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)


class LaunchedCluster:
    """A running head. `stop` ends it, and Ray too when we started it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._ray = _Ray.connect()
        self._stopped = False
        try:
            self._head = self._start_head(config)
            self.grpc_address: str = _get(self._head.start.remote())
            self._ended = self._head.wait.remote()
        except BaseException:
            self.stop()
            raise

    def _start_head(self, config: ClusterConfig) -> "ray.actor.ActorHandle":
        host = None if self._ray.temp_dir is None else "127.0.0.1"
        spec = HeadSpec(config=config, door=DOOR, token=secrets.token_hex(32), host=host)
        try:
            return HeadActor.options(  # type: ignore[attr-defined]  # made by ray.remote
                name=HEAD_NAME,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(_this_node(), soft=False),  # where clients look for it
            ).remote("pdserve.cluster.head:Head", spec)
        except ValueError as error:  # the name is taken
            raise LaunchError("a pdserve cluster runs in this Ray cluster already; stop it with `pdserve down`") from error

    def poll(self) -> str | None:
        """Why the head died, or None while it is alive or has ended as it was told to."""
        if not self.ended:
            return None
        try:
            ray.get(self._ended)
        except RayError as error:
            return f"the head process died: {reason_of(error)}"
        return None

    @property
    def ended(self) -> bool:
        """Whether the head is gone: shut down, or dead (see `poll`)."""
        done, _ = ray.wait([self._ended], timeout=0)
        return bool(done)

    def stop(self) -> None:
        """End the cluster now, without draining; idempotent."""
        if self._stopped:
            return
        self._stopped = True
        head = getattr(self, "_head", None)
        if head is not None:
            # if it does not answer it is dead, or about to be: its workers die with it
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):
                ray.get(head.stop.remote(), timeout=10.0)
            ray.kill(head)
        self._ray.disconnect()

    def __enter__(self) -> "LaunchedCluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


def launch(config: ClusterConfig) -> LaunchedCluster:
    """Start a cluster; its workers load while this returns.

    Raises ConfigError when the address to listen on is taken, LaunchError when Ray or the head does not start, or when
    the model cannot be read or does not fit.
    """
    _check_port_is_free(*config.listen.grpc_host_port)
    return LaunchedCluster(config)


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _check_port_is_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"listen.grpc: cannot listen on {host}:{port}: {error.strerror}") from error


def _get(reference: "ray.ObjectRef[str]") -> str:
    try:
        return str(ray.get(reference))
    except RayError as error:
        raise LaunchError(reason_of(error)) from error
