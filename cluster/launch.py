"""From a configuration to a running head: finds or starts Ray, starts the head actor in it, and ends what it
started.

The cluster ends with the process that launched it.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core import admin_socket
from ..core.config import ClusterConfig
from ..core.errors import ConfigError
from ..core.log_settings import LogSettings
from ..engine.gpu import VISIBLE, probe_node
from ..head.spec import Endpoints, HeadSpec
from . import ray_address, ray_folder
from .actors import KEEPER_NAME, NAMESPACE, HeadActor, KeeperActor, reason_of
from .descendants import descendants
from .errors import LaunchError
from .ray_address import RayAddress
from .ray_start import without_unused_processes
from .ray_token import RayToken

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: pdserve does not use it
# before a head is started after one that ran no longer than this; doubles with each that cannot start
RESTART_PAUSE_S = 1.0
MAX_RESTART_PAUSE_S = 30.0


@dataclass(frozen=True)
class _Ray:
    """A Ray cluster that this process is connected to: an existing one, unless it has a `token`. `ours`: we
    connected to it."""

    ours: bool = True
    token: RayToken | None = None

    @staticmethod
    def connect(run_folder: Path) -> "_Ray":
        """Adopts the cluster that this process is connected to or that RAY_ADDRESS names, else starts one in
        `run_folder`.

        Raises LaunchError, also when other users could run code through an existing cluster."""
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        adopted = _Ray._adopt(options)
        if adopted is None:
            return _Ray._start(run_folder, options)
        try:
            ray_folder.check(ray_folder.session_folder(), ray_folder.sockets(), ray_folder.is_accepted())
        except BaseException:
            adopted.disconnect()
            raise
        return adopted

    @staticmethod
    def _adopt(options: dict[str, Any]) -> "_Ray | None":
        """Reads no file in /tmp, where `ray start` leaves its address: anybody can write there."""
        if ray.is_initialized():
            ray_address.check_token(ray.get_runtime_context().gcs_address, ray_folder.is_accepted())
            return _Ray(ours=False)
        named = os.environ.get(ray_address.VARIABLE)
        if not named:
            return None
        address = RayAddress.parse(named)
        ray_address.check_listener(address)
        ray_address.check_token(str(address), ray_folder.is_accepted())
        try:
            ray.init(address=str(address), **options)
        except (
            OSError,
            RuntimeError,
            ValueError,
            RayError,
        ) as error:  # or it rejects our token
            raise LaunchError(
                f"cannot connect to the Ray cluster at {ray_address.VARIABLE}={address}: {error}"
            ) from error
        return _Ray()

    @staticmethod
    def _start(run_folder: Path, options: dict[str, Any]) -> "_Ray":
        started = _Ray(token=RayToken(run_folder))
        node = probe_node()
        if (
            node.usable_devices
        ):  # by name: Ray counts from 0, and some of the machine's GPUs may be hidden from us
            os.environ[VISIBLE] = ",".join(gpu.uuid for gpu in node.usable_devices)
        try:
            with without_unused_processes():
                ray.init(
                    address="local",
                    num_cpus=len(node.cores),
                    num_gpus=len(node.usable_devices),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    # Ray makes it world-writable: other users cannot reach it
                    _temp_dir=str(run_folder / "ray"),
                    # Ray would lower our processes' priority below any other on the machine
                    _system_config={"worker_niceness": 0},
                    **options,
                )
        except BaseException:  # Ctrl-C as well
            started.disconnect()
            raise
        return started

    def disconnect(self) -> None:
        if self.ours:
            ray.shutdown()
        if self.token is not None:
            self.token.withdraw()


class LaunchedCluster:
    """A running head, replaced when it dies: workers and their streams outlive it. `stop` ends everything,
    including Ray when we started it."""

    def __init__(
        self, config: ClusterConfig, log_settings: LogSettings | None, on_step: Callable[[str], None]
    ) -> None:
        # for this user alone; sockets need short paths
        self._folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
        self._endpoints: Endpoints | None = None
        self._is_launched = False
        _running.append(self)
        on_step("starting Ray" if ray_address.VARIABLE not in os.environ else "connecting to Ray")
        try:
            self._ray = _Ray.connect(self._folder)
        except BaseException:
            self._remove_folder()
            raise
        self._lock = threading.Lock()  # guards `_stopped` and `_head`
        self._stopped = False
        self._stopping = threading.Event()  # ends pauses
        self._head: Any = None
        self._keeper: Any = None
        self._error: str | None = None
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="head-supervisor", daemon=True)
        on_step("starting the head")
        try:
            self._keeper = self._create_keeper(config, log_settings)
            host = None if self._ray.token is None else "127.0.0.1"
            self._spec = HeadSpec(
                token=secrets.token_hex(32),
                host=host,
                log=log_settings,
                otlp_endpoint=config.observability.otlp_endpoint or _otlp_endpoint(),
                local=self.local_address,
                accept_open_ray=ray_folder.is_accepted(),
            )
            self._endpoints = self._start_first_head()
            admin_socket.publish(self.grpc_address, self._socket)
        except BaseException:
            self.stop()
            raise
        self._supervisor.start()
        self._is_launched = True

    @property
    def grpc_address(self) -> str:
        assert self._endpoints is not None
        return self._endpoints.grpc

    @property
    def http_address(self) -> str | None:
        assert self._endpoints is not None
        return self._endpoints.http

    @property
    def local_address(self) -> str:
        """The address of the same services for this user's processes alone: without TLS and without a key."""
        return f"unix:{self._socket}"

    @property
    def _socket(self) -> Path:
        return self._folder / "grpc.sock"

    def _start_first_head(self) -> Endpoints:
        self._create_head()
        return _get(self._head.start.remote())

    def _create_keeper(self, config: ClusterConfig, log_settings: LogSettings | None) -> Any:
        """Creates the keeper, one per Ray cluster: its name marks that pdserve runs there."""
        here = NodeAffinitySchedulingStrategy(_this_node(), soft=False)
        try:
            options = KeeperActor.options(name=KEEPER_NAME, scheduling_strategy=here)  # type: ignore[attr-defined]
            return options.remote(config, log_settings)
        except ValueError as error:  # the name is taken
            raise LaunchError(
                "a pdserve cluster is already running in this Ray cluster; stop it with `pdserve down`"
            ) from error

    def _create_head(self) -> None:
        here = NodeAffinitySchedulingStrategy(_this_node(), soft=False)  # where clients expect it
        self._head = HeadActor.options(  # type: ignore[attr-defined]  # made by ray.remote
            max_concurrency=1000, scheduling_strategy=here
        ).remote(self._spec, self._keeper)

    def _supervise(self) -> None:
        """Replaces the head until it has ended as requested, or the keeper or this host is gone."""
        keeper = self._keeper.live.remote()
        try:
            while not self._stopped:
                started_s = time.monotonic()
                ended = self._head.wait.remote()
                ray.wait([ended, keeper])
                _check_keeper(keeper)
                try:
                    ray.get(ended)
                    break
                except RayActorError as error:
                    log.warning("the head died: %s", reason_of(error))
                _check_node()
                if time.monotonic() - started_s < RESTART_PAUSE_S:
                    self._stopping.wait(RESTART_PAUSE_S)
                pause_s = RESTART_PAUSE_S
                while why := self._replace_head():
                    log.error("no head can start: %s; the next attempt is in %.0f s", why, pause_s)
                    self._stopping.wait(pause_s)
                    _check_keeper(keeper)
                    _check_node()
                    pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
        except (LaunchError, RayError) as error:
            if not self._stopped:
                reason = reason_of(error) if isinstance(error, RayError) else str(error)
                self._error = f"the cluster's processes died and cannot be replaced: {reason}"
                ray.kill(self._head)
                _reap()
        finally:
            self._over.set()

    def _replace_head(self) -> str:
        """Returns why the next head cannot start; empty when it has, or when none is wanted any more."""
        with self._lock:
            if self._stopped:
                return ""
            self._spec = replace(self._spec, generation=self._spec.generation + 1, endpoints=self._endpoints)
            ray.kill(self._head)  # Ray also declares a head dead that it cannot reach for a while
            self._create_head()
        try:
            ray.get(self._head.start.remote())
        except RayActorError:  # dead again: `wait` will report it
            return ""
        except RayTaskError as error:
            return reason_of(error)
        return ""

    def metrics(self) -> bytes:
        """Returns the head's metrics in Prometheus' text format. Raises RayActorError when it has just
        died."""
        metrics: bytes = ray.get(self._head.metrics.remote())
        return metrics

    def poll(self) -> str | None:
        """Returns why the cluster is gone; None while it is running or has ended as requested."""
        return self._error

    @property
    def ended(self) -> bool:
        """Whether the cluster is gone: shut down, or dead (see `poll`)."""
        return self._over.is_set()

    def stop(self) -> None:
        """Ends the cluster now, without draining; idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            self._stopping.set()
        if self._endpoints is not None:
            admin_socket.withdraw(self.grpc_address, self._socket)
        if self._head is not None:
            # a head that does not answer is dead, or about to be
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):
                ray.get(self._head.stop.remote(), timeout=10.0)
            ray.kill(self._head)
        if self._keeper is not None:
            ray.kill(self._keeper)  # remaining workers die with it
        if self._supervisor.is_alive():
            self._supervisor.join(timeout=10.0)
        self._ray.disconnect()
        self._remove_folder()

    def abandon(self) -> None:
        """Removes its traces, when its processes have been killed: those in a Ray of our own. In another Ray,
        it kills them; if it has not launched them all, Ray ends them when this process has ended."""
        if self._is_launched and self._ray.token is None:
            self._stopped = True  # whoever has the lock may be what this interrupts
            ray.kill(self._head)
            ray.kill(self._keeper)
        if self._endpoints is not None:
            admin_socket.withdraw(self.grpc_address, self._socket)
        self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        _running.remove(self)

    def __enter__(self) -> "LaunchedCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def launch(
    config: ClusterConfig,
    log_settings: LogSettings | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> LaunchedCluster:
    """Starts a cluster and returns while its workers load. `on_step` is called with what begins. Without
    `log_settings`, its processes' warnings go to Ray's logs.

    Raises ConfigError when the address to listen on is taken, UnsafeFolder when this user's runtime folder is
    not private, LaunchError when Ray or the head does not start, or when the model cannot be read or does not
    fit."""
    admin_socket.prepare()
    _check_port_is_free("grpc", *config.listen.grpc_host_port)
    if config.listen.http_host_port is not None:
        _check_port_is_free("http", *config.listen.http_host_port)
    return LaunchedCluster(config, log_settings, on_step)


def abandon() -> None:
    """Kills all processes below this one and removes the folders of its clusters, started or starting. For a
    process that ends at once, as Ray can be shut down in good order only when its start is complete."""
    for child in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for cluster in _running.copy():  # each takes itself out
        cluster.abandon()


_running: list[LaunchedCluster] = []  # of this process


def _otlp_endpoint() -> str | None:
    """Returns the endpoint in this process's environment: the head's may differ when Ray is an existing
    one."""
    return (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or None
    )


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _check_keeper(living: "ray.ObjectRef[None]") -> None:
    """Raises RayError when the keeper is gone, and all workers with it."""
    with contextlib.suppress(GetTimeoutError):  # it is running
        ray.get(living, timeout=0.0)


def _check_node() -> None:
    """Raises LaunchError on a host whose raylet is gone, where a new head would wait for ever."""
    if any(node["NodeID"] == _this_node() and not node["Alive"] for node in ray.nodes()):
        raise LaunchError("Ray has declared this host dead")


def _reap() -> None:
    """Reaps a raylet that we started and that died: as a zombie it counts as alive for the processes that it
    started, and they stay."""
    if ray_worker._global_node is not None:
        ray_worker._global_node.dead_processes()


def _check_port_is_free(server: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"listen.{server}: cannot listen on {host}:{port}: {error.strerror}") from error


def _get(reference: "ray.ObjectRef[Endpoints]") -> Endpoints:
    try:
        endpoints: Endpoints = ray.get(reference)
        return endpoints
    except RayError as error:
        raise LaunchError(reason_of(error)) from error
