"""A worker's end of its connection: what becomes of it when the router stands still."""

import socket
import threading

import pytest

from pdserve.cluster import worker_link
from pdserve.cluster.worker_link import RouterLink
from pdserve.core.messages import Hello, LoadProgress

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
