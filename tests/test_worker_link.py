"""A worker's end of its connection: what becomes of it when the router stands still."""

import socket
import threading

import pytest

from pdserve.cluster import worker_link, worker_process
from pdserve.cluster.worker_link import RouterLink
from pdserve.cluster.worker_process import WorkerProcess
from pdserve.cluster.worker_spec import WorkerSpec
from pdserve.core.codec import FrameDecoder
from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CheckpointError
from pdserve.core.messages import Hello, LoadProgress, Role, WorkerMessage
from pdserve.engine.engine import Engine

WAIT_S = 60.0  # far more than anything here takes


def test_a_router_that_reads_no_more_is_lost_also_while_a_sender_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "DEAD_AFTER_S", 0.2)
    monkeypatch.setattr(worker_link, "HEARTBEAT_S", WAIT_S)  # the heartbeat's thread waits behind the sender: it cannot tell
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as door:
        hello = Hello(worker_id="decode-0", incarnation=1, token="secret")
        link = RouterLink(door.getsockname(), hello, lambda _: None, lambda _: lost.set())
        frozen, _ = door.accept()
        with frozen:
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

    def __init__(self, router_address: tuple[str, int], tells_late: bool = False) -> None:
        super().__init__(
            WorkerSpec(
                worker_id="decode-0",
                incarnation=1,
                role=Role.DECODE,
                config=ClusterConfig.model_validate({}),
                num_blocks=8,
                router_address=router_address,
                token="secret",
                host=None,
            )
        )
        self._reconnected = threading.Event()
        self._tells_late = tells_late

    def _load_engine(self) -> Engine:
        raise CheckpointError("layer 3 is gone")

    def _progress(self, phase: str, fraction: float) -> None:
        assert not self._tells_late or self._reconnected.wait(WAIT_S)
        super()._progress(phase, fraction)

    def _on_lost(self, link: RouterLink) -> None:
        super()._on_lost(link)
        self._reconnected.set()


def run_until_it_fails(worker: WorkerProcess) -> None:
    with pytest.raises(CheckpointError):
        worker.run()


def test_a_worker_that_cannot_go_on_does_not_look_for_another_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "bind_to_cores", lambda positions: ())
    with socket.create_server(("127.0.0.1", 0)) as door:
        with pytest.raises(CheckpointError):
            Unloadable(door.getsockname()).run()
        door.accept()[0].close()
        door.setblocking(False)
        with pytest.raises(BlockingIOError):
            door.accept()


def test_a_worker_that_lost_its_router_before_it_said_anything_tells_the_next_one_that_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "bind_to_cores", lambda positions: ())
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(WAIT_S)
        worker = Unloadable(door.getsockname(), tells_late=True)
        thread = threading.Thread(target=run_until_it_fails, args=(worker,), daemon=True)
        thread.start()
        door.accept()[0].close()
        connection, _ = door.accept()
        with connection:
            data = b""
            while more := connection.recv(1 << 16):
                data += more
        thread.join(WAIT_S)
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    assert [type(message) for message in decoder.feed(data)] == [Hello, LoadProgress]
