"""A worker's end of its connection: its behaviour when the router stalls."""

import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.core.codec import FrameDecoder
from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CheckpointError
from pdserve.core.handshake import OPENING_BYTES
from pdserve.core.messages import Failing, Hello, LoadProgress, Role, WorkerMessage
from pdserve.engine.engine import Engine
from pdserve.worker import process as worker_process, router_link as worker_link, router_session
from pdserve.worker.process import WorkerProcess
from pdserve.worker.router_link import RouterLink
from pdserve.worker.spec import WorkerSpec

from ..handshakes import greeted, read
from ..router.cluster import worker_info

WAIT_S = 60.0  # far more than anything here takes


def test_a_router_that_stops_reading_is_lost_even_while_a_sender_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router_session, "DEAD_AFTER_S", 0.2)
    # the heartbeat's thread waits behind the sender: it cannot report the loss
    monkeypatch.setattr(worker_link, "HEARTBEAT_S", WAIT_S)
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        hello = Hello(worker_id="decode-0", incarnation=1)
        with greeted(server, "secret") as accepted:
            link = RouterLink(server.getsockname(), "secret", hello, lambda _: None, lambda _: lost.set())
        with accepted.get() as frozen:
            assert frozen.getsockname()
            link.start()
            message = LoadProgress(worker_id="decode-0", incarnation=1, phase="x" * (1 << 20), fraction=0.0)
            sender = threading.Thread(target=lambda: link.send(*[message] * 40), daemon=True)
            sender.start()
            assert lost.wait(WAIT_S)
            sender.join(WAIT_S)
            assert not sender.is_alive()
        link.close()


class Unloadable(WorkerProcess):
    """A worker whose checkpoint is broken."""

    def __init__(self, router_address: tuple[str, int], reports_late: bool = False) -> None:
        super().__init__(
            WorkerSpec(
                worker_id="decode-0",
                incarnation=1,
                role=Role.DECODE,
                config=ClusterConfig.model_validate({}),
                device="cpu",
                num_blocks=8,
                router_address=router_address,
                token="secret",
                host=None,
            )
        )
        self._reconnected = threading.Event()
        self._reports_late = reports_late

    def _load_engine(self) -> Engine:
        raise CheckpointError("layer 3 is gone")

    def _progress(self, phase: str, fraction: float) -> None:
        assert not self._reports_late or self._reconnected.wait(WAIT_S)
        super()._progress(phase, fraction)

    def _on_lost(self, link: RouterLink) -> None:
        super()._on_lost(link)
        self._reconnected.set()


def run_until_it_fails(worker: WorkerProcess) -> None:
    with pytest.raises(CheckpointError):
        worker.run()


def test_a_worker_that_cannot_continue_does_not_look_for_another_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "bind_to_cores", lambda positions: ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        with greeted(server, "secret") as accepted, pytest.raises(CheckpointError):
            Unloadable(server.getsockname()).run()
        accepted.get().close()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_worker_that_lost_its_router_early_reports_loading_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "bind_to_cores", lambda positions: ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        worker = Unloadable(server.getsockname(), reports_late=True)
        thread = threading.Thread(target=run_until_it_fails, args=(worker,), daemon=True)
        with greeted(server, "secret") as accepted:
            thread.start()
        accepted.get().close()
        with greeted(server, "secret") as accepted:
            pass
        with accepted.get() as connection:
            data = b""
            while more := connection.recv(1 << 16):
                data += more
        thread.join(WAIT_S)
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    assert [type(message) for message in decoder.feed(data)] == [Hello, LoadProgress]


class Crashing(Unloadable):
    """A worker whose engine fails once it serves."""

    def _load_engine(self) -> Engine:
        engine: Any = SimpleNamespace()
        return engine  # type: ignore[no-any-return]

    def _serve(self, *parts: Any) -> None:
        self._info = worker_info("decode-0", Role.DECODE)
        self._session.loaded()
        raise MemoryError("no block is left")


def test_the_router_hears_of_a_crash_before_the_worker_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "bind_to_cores", lambda positions: ())
    is_read = threading.Event()
    endpoint = SimpleNamespace(close=lambda: is_read.wait(WAIT_S))
    monkeypatch.setattr(worker_process, "Transfers", lambda *args: endpoint)
    failed: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        worker = Crashing(server.getsockname())

        def run() -> None:
            try:
                worker.run()
            except MemoryError as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        with greeted(server, "secret") as accepted:
            thread.start()
        with accepted.get() as connection:
            connection.settimeout(WAIT_S / 2)
            data = b""
            while more := connection.recv(1 << 16):
                data += more
        is_read.set()
        thread.join(WAIT_S)
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    *_, last = decoder.feed(data)
    assert isinstance(last, Failing) and last.reason == "MemoryError: no block is left"
    assert failed


def test_a_router_that_does_not_know_the_token_learns_nothing() -> None:
    """Not even the caller's identity."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            peer, _ = server.accept()
            with peer:
                heard.append(read(peer, OPENING_BYTES))
                peer.sendall(bytes(64))
                heard.append(peer.recv(4096))

        thread = threading.Thread(target=pretend)
        thread.start()
        hello = Hello(worker_id="decode-0", incarnation=1)
        with pytest.raises(ConnectionError, match="does not know this cluster's token"):
            RouterLink(server.getsockname(), "secret", hello, lambda _: None, lambda _: None)
        thread.join(WAIT_S)
    assert heard[1] == b"" and b"secret" not in heard[0] and b"decode-0" not in heard[0]


def test_a_silent_router_is_not_awaited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "MAX_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        RouterLink(
            silent.getsockname(),
            "secret",
            Hello(worker_id="d", incarnation=1),
            lambda _: None,
            lambda _: None,
        )
