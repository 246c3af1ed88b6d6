"""A cluster that starts beside another of the same user says with whom it shares cores."""

from pathlib import Path

import pytest

from pdserve.cli import neighbours as module
from pdserve.cli.neighbours import neighbours
from pdserve.core import admin_socket
from pdserve.core.config import ClusterConfig
from pdserve.core.hosts import HostState, HostStatus
from pdserve.engine.gpu import Node
from pdserve.planner.plan import Plan, plan
from tests.cli.conftest import ServerThread


def planned(num_cores: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The default configuration, of two cores, on a machine with so many."""
    node = Node("here", tuple(range(num_cores)), 1 << 34, 1 << 34)
    monkeypatch.setattr(module, "probe_node", lambda: node)
    return plan(ClusterConfig(), [node])


@pytest.fixture
def other(server: ServerThread) -> ServerThread:
    """Another cluster, which takes two cores."""
    host = HostStatus(address="127.0.0.1", state=HostState.JOINED, since_s=1.0, num_cores_taken=2.0)
    server.call(lambda: server.cluster.change(hosts=(host,)))
    return server


def test_a_cluster_on_the_same_cores_is_named(other: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = neighbours(planned(3, monkeypatch))
    assert line == (
        "the cluster that serves tiny takes 2 of this machine's 3 cores; the two clusters share them and slow each other down"
    )


def test_a_machine_with_room_for_both_needs_no_word(
    other: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(neighbours(planned(4, monkeypatch))) == []


def test_clusters_that_are_gone_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    admin_socket.publish("127.0.0.1:1", tmp_path / "grpc.sock")
    assert list(neighbours(planned(2, monkeypatch))) == []
