"""The watch feeds the reports of Ray and hosts to `Hosts`, and carries out its decisions."""

import asyncio
from collections.abc import Sequence
from math import inf
from typing import Any

import pytest

from pdserve.core.config import ClusterConfig
from pdserve.core.hosts import ExpectedHosts
from pdserve.core.messages import Role
from pdserve.core.needs import Need
from pdserve.engine.gpu import Node
from pdserve.head import host_watch as host_watch_module
from pdserve.head.host_watch import HostWatch
from pdserve.head.ports import InstanceResources
from pdserve.router.cores import Capacity, Placement
from pdserve.router.events import Tick
from pdserve.router.hosts import CHECK_AGAIN_S, HostChecked, Hosts, SeenHost
from pdserve.router.places import Places

HEAD = SeenHost("n1", "10.0.0.1", "head", is_head=True)
B = SeenHost("n2", "10.0.0.2", "b")
WITH_B = ClusterConfig().expecting(ExpectedHosts(("10.0.0.2",)))


class FakeNodes:
    """Hosts that answer, and a Ray that fails, on the test's request."""

    def __init__(self, *seen: SeenHost) -> None:
        self.alive: tuple[SeenHost, ...] | Exception = seen
        self.num_looks = 0
        self.looked = asyncio.Event()
        self.answers: dict[str, asyncio.Future[HostChecked]] = {}
        self.requests: list[list[tuple[float, float | None]]] = []  # (cores, GPU) of each instance

    async def seen(self) -> tuple[SeenHost, ...]:
        self.num_looks += 1
        self.looked.set()
        if isinstance(self.alive, Exception):
            raise self.alive
        return self.alive

    async def check(self, node_id: str, config: ClusterConfig, device: str) -> HostChecked:
        self.answers[node_id] = asyncio.get_running_loop().create_future()
        return await self.answers[node_id]

    async def request(self, instances: Sequence[InstanceResources]) -> None:
        self.requests.append([(one.num_cpus, one.gpu_share) for one in instances])

    def node(self, node_id: str) -> Node:
        return Node(node_id, (0,), 100, 40)

    async def answer(self, node_id: str, num_bytes: float = inf) -> None:
        await settled()
        self.answers.pop(node_id).set_result(HostChecked(node_id, Capacity(2, num_bytes=num_bytes)))
        await settled()

    async def look_again(self) -> None:
        """Waits until the watch has polled once more."""
        self.looked.clear()
        await self.looked.wait()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def watch_of(nodes: Any, *, is_alone: bool = False) -> HostWatch:
    return HostWatch(Hosts(Places()), nodes, "cpu", is_alone=is_alone)


def states(watch: HostWatch) -> dict[str, str]:
    return {host.address: host.state.value for host in watch.hosts.status(0.0)}


async def test_hosts_that_join_while_it_runs_serve_once_they_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_watch_module, "WATCH_INTERVAL_S", 0.0)
    nodes = FakeNodes(HEAD)
    watch = watch_of(nodes)
    changes: list[dict[str, str]] = []
    watch.on_change = lambda: changes.append(states(watch))
    await watch.start(WITH_B)
    await nodes.answer("n1")
    assert not watch.are_complete(WITH_B)
    assert watch.are_complete(ClusterConfig())
    nodes.alive = ConnectionError("Ray's head is busy")
    await nodes.look_again()
    assert states(watch) == {"10.0.0.1": "joined", "10.0.0.2": "awaited"}, (
        "what it does not say changes nothing"
    )
    nodes.alive = (HEAD, B)
    await nodes.look_again()
    await nodes.answer("n2")
    assert changes[-1] == {"10.0.0.1": "joined", "10.0.0.2": "joined"}
    assert [node.name for node in watch.nodes(WITH_B)] == ["n1", "n2"]
    assert [node.name for node in watch.nodes(ClusterConfig().expecting(ExpectedHosts(())))] == ["n1"]
    await watch.close()


async def test_a_suspected_host_is_checked_without_reporting_a_change() -> None:
    nodes = FakeNodes(HEAD, B)
    watch = watch_of(nodes)
    await watch.start(WITH_B)
    await nodes.answer("n1")
    await nodes.answer("n2")
    changes: list[None] = []
    watch.on_change = lambda: changes.append(None)
    watch.suspect("n2")
    assert states(watch)["10.0.0.2"] == "checking"
    assert changes == []
    await nodes.answer("n2")
    assert states(watch)["10.0.0.2"] == "joined"
    assert changes
    await watch.close()


async def test_a_host_whose_check_fails_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_watch_module, "WATCH_INTERVAL_S", 0.0)
    nodes = FakeNodes(HEAD, B)
    watch = watch_of(nodes)
    await watch.start(WITH_B)
    await nodes.answer("n1")
    nodes.answers.pop("n2").set_exception(ConnectionError("Ray's head is busy"))
    await nodes.look_again()
    assert "10.0.0.2: its check failed (ConnectionError: Ray's head is busy)" in (
        watch.hosts.problems() or ""
    )
    watch.hosts.handle(Tick(), asyncio.get_running_loop().time() + CHECK_AGAIN_S)
    assert states(watch)["10.0.0.2"] == "checking"
    await watch.close()


async def test_a_full_host_is_named_in_the_log_and_the_status(caplog: pytest.LogCaptureFixture) -> None:
    nodes = FakeNodes(HEAD, B)
    watch = watch_of(nodes)
    await watch.start(WITH_B)
    await nodes.answer("n1")
    await nodes.answer("n2")
    watch.refuse("n2", (("/dev/shm", 64 << 20), ("its memory", 16 << 30)))
    said = "no space is left in /dev/shm (64 MiB), its memory (16 GiB) there; make room"
    assert f"host 10.0.0.2: {said}" in (watch.hosts.problems() or "")
    assert f"host 10.0.0.2: {said}" in caplog.text
    await watch.close()


async def test_a_host_that_has_answered_has_joined() -> None:
    nodes = FakeNodes(B)
    watch = watch_of(nodes)
    joined: list[None] = []
    watch.on_join = lambda: joined.append(None)
    await watch.start(WITH_B)
    assert not joined
    await nodes.answer("n2")
    assert len(joined) == 1
    await watch.close()


async def test_workers_of_a_removed_host_are_named() -> None:
    nodes = FakeNodes(B)
    watch = watch_of(nodes)
    await watch.start(WITH_B)
    await nodes.answer("n2")
    watch.hosts.places.ask(("decode-0", 1), Role.DECODE, Need(1, 1.0))
    watch.hosts.places.next()
    vacated: list[object] = []
    watch.on_vacate = vacated.append
    watch.expect(ClusterConfig().expecting(ExpectedHosts(())))
    assert vacated == [(("decode-0", 1),)]
    await watch.close()


async def test_in_our_own_ray_no_named_host_is_awaited() -> None:
    nodes = FakeNodes(HEAD)
    watch = watch_of(nodes, is_alone=True)
    await watch.start(WITH_B)
    await nodes.answer("n1")
    assert watch.are_complete(WITH_B)
    assert states(watch) == {"10.0.0.1": "joined"}
    await watch.close()


async def test_a_host_may_be_named_by_its_dns_name() -> None:
    nodes = FakeNodes(SeenHost("n2", "127.0.0.1", "its-own-name"))
    watch = watch_of(nodes)
    named = ClusterConfig().expecting(ExpectedHosts(("localhost", "nowhere.invalid")))
    await watch.start(named)
    await nodes.answer("n2")
    assert states(watch) == {"127.0.0.1": "joined", "nowhere.invalid": "awaited"}
    await watch.close()


async def test_memory_that_running_workers_hold_is_planned_again_for_them() -> None:
    nodes = FakeNodes(HEAD)
    watch = watch_of(nodes)
    watch.hosts.places.adopt(("decode-0", 1), Role.DECODE, Placement("n1", (0,)), Need(1, 1.0, None, 60))
    await watch.start(ClusterConfig())
    await nodes.answer("n1", num_bytes=40)
    assert [node.available_memory_bytes for node in watch.nodes(ClusterConfig())] == [100]
    await watch.close()


async def test_an_autoscaler_is_asked_for_all_instances_in_force_and_for_none_at_the_end() -> None:
    def config(instances: int, max_hosts: int) -> ClusterConfig:
        pools = {"prefill": {"cpus_per_instance": 0.5}, "decode": {"instances": instances}}
        found = ClusterConfig.model_validate({"pools": pools})
        return found.expecting(ExpectedHosts(node_types={"cpu": 1}, max_hosts=max_hosts))

    nodes = FakeNodes(HEAD)
    watch = watch_of(nodes)
    await watch.start(config(1, max_hosts=4))
    watch.expect(config(3, max_hosts=4))
    await settled()
    assert nodes.requests[-1] == [(1.0, None)] * 3 + [(0.5, None)]
    watch.expect(config(3, max_hosts=1))
    await settled()
    assert nodes.requests[-1] == [], "all that the file allows are there for good"
    watch.expect(config(2, max_hosts=4))
    await settled()
    await watch.close()
    assert nodes.requests[-2:] == [[(1.0, None)] * 2 + [(0.5, None)], []]


async def test_nothing_is_asked_of_an_autoscaler_where_the_file_has_none() -> None:
    nodes = FakeNodes(HEAD)
    watch = watch_of(nodes)
    await watch.start(WITH_B)
    await watch.close()
    assert nodes.requests == []
