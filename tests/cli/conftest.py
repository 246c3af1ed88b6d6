"""A server on a loop of its own, so that commands can be run as a person runs them."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli.main import app
from pdserve.core import admin_socket
from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import GatewayServer, serve
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info

Run = Callable[..., Result]


class ServerThread:
    """A server in front of a scripted cluster, its socket where the launcher puts it; `call` runs something
    on its loop."""

    def __init__(self, config: ClusterConfig = CONFIG) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
        self.socket = self.folder / "grpc.sock"
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.cluster: ScriptedCluster = self.call(lambda: ScriptedCluster(byte_level()))
        self.gateway: GatewayServer = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        admin_socket.publish(self.gateway.grpc_address, self.socket)

    async def _serve(self) -> GatewayServer:
        model = model_info(self.cluster.tokenizer)
        return await serve(
            self.cluster, self._config, self.cluster.tokenizer, model, local=self.local_address
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    @property
    def local_address(self) -> str:
        return f"unix:{self.socket}"

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def stop_when_shut_down(self) -> None:
        """Ends the server once the cluster receives a shutdown, as the head does."""
        self.cluster.on_shutdown = lambda: self._stop_soon(1.0)

    def stop_when_watched(self) -> None:
        """End the server once a client has seen the first state."""
        self.cluster.on_watch = lambda: self._stop_soon(0.0)

    def _stop_soon(self, grace_s: float) -> None:
        self._stopping = self._loop.create_task(self.gateway.stop(grace_s))

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.gateway.stop(0), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        admin_socket.withdraw(self.gateway.grpc_address, self.socket)
        shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for this test alone."""
    monkeypatch.setenv(admin_socket.RUNTIME_FOLDER, str(tmp_path / "runtime"))
    return tmp_path / "runtime"


@pytest.fixture
def server() -> Iterator[ServerThread]:
    server = ServerThread()
    yield server
    server.stop()


@pytest.fixture
def cluster(server: ServerThread) -> ScriptedCluster:
    return server.cluster


@pytest.fixture
def run(server: ServerThread) -> Run:
    """Runs a command against the server."""

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(
            app, arguments, input=stdin, env={"PDSERVE_ADDRESS": server.address, "COLUMNS": "200"}
        )

    return invoke
