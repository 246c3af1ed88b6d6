"""Workers' lives as the controller sees them, over actors that a test controls."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from pdserve.core.errors import CheckpointError
from pdserve.core.messages import HostFull, LoadProgress, Ready
from pdserve.router import supervisor
from pdserve.router.core import Router
from pdserve.router.cores import Capacity
from pdserve.router.events import Tick
from pdserve.router.fleet_events import Apply, Drain, Shutdown
from pdserve.router.fleet_member import MemberState
from pdserve.router.supervisor import ProcessState
from pdserve.router.worker_sessions import MAX_SILENT_BEATS

from ..router.cluster import worker_info
from .controller_world import D, FakeActor, FakeConnection, P, World


async def test_a_replacement_waits_for_the_cores_of_the_frozen_worker_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, stable_s=0.0)
    world.up()
    frozen = world.actor("worker-0")
    frozen.is_frozen = True
    world.disconnect("worker-0", "reset")
    assert world.state("worker-0") is MemberState.STARTING
    assert world.actor("worker-0") is frozen
    assert "waiting" in world.controller.phase(("worker-0", 3))
    await frozen_is_killed(frozen)
    await world.settle()
    assert world.actor("worker-0").spec.incarnation == 3
    assert [event.incarnation for event in world.losses("worker-0")] == [1, 1]
    world.connect("worker-0")
    assert world.state("worker-0") is MemberState.READY


async def test_a_worker_that_fell_silent_is_killed_without_being_asked_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, stable_s=0.0)
    world.up()
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT_S", 3600.0)
    actor = world.actor("worker-0")
    actor.is_frozen = True
    world.disconnect("worker-0", num_silent_beats=MAX_SILENT_BEATS + 1)
    await world.settle()
    assert actor.num_stops == 0
    assert world.actor("worker-0").spec.incarnation == 3
    assert world.error("worker-0") == "silent for 3.0 s"


async def frozen_is_killed(actor: FakeActor) -> None:
    with pytest.raises(ActorDiedError):
        await asyncio.shield(actor.ended)


async def test_a_stopped_worker_counts_until_its_process_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.up()
    actor = world.actor("worker-0")
    actor.is_frozen = True
    world.controller.handle(Drain("worker-0"))  # idle, so that it is stopped at once
    world.disconnect("worker-0")
    assert world.state("worker-0") is MemberState.STOPPING
    assert world.losses("worker-0") == []
    await frozen_is_killed(actor)
    await world.settle()
    assert world.state("worker-0") is MemberState.DRAINED
    assert len(world.losses("worker-0")) == 1
    assert actor.num_stops == 1


async def test_a_failed_worker_reports_why_even_after_its_connection_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.up()
    actor = world.actor("worker-0")
    actor.is_frozen = True
    world.disconnect("worker-0")
    assert world.error("worker-0") == "connection closed"
    actor.end(RayTaskError("run", "a traceback", CheckpointError("layer 3 is gone")))
    await world.settle()
    assert world.state("worker-0") is MemberState.BACKOFF
    assert world.error("worker-0") == "layer 3 is gone"


@pytest.mark.parametrize("connection_first", [True, False])
async def test_a_killed_worker_is_lost_to_the_router_once_and_replaced_once(
    monkeypatch: pytest.MonkeyPatch, connection_first: bool
) -> None:
    world = World(monkeypatch, stable_s=0.0)
    world.up()
    actor = world.actor("worker-1")
    if connection_first:
        world.disconnect("worker-1")
        actor.end(ActorDiedError())
        await world.settle()
    else:
        actor.end(ActorDiedError())
        await world.settle()
        world.break_off(actor.spec)
    assert [actor.spec.incarnation for actor in world.actors if actor.spec.worker_id == "worker-1"] == [2, 3]
    world.connect("worker-1")
    assert {worker.worker_id for worker in world.service.router.status(0.0).workers} == {
        "worker-1",
        "worker-0",
    }


async def test_a_worker_that_waits_for_cores_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, num_cores=1)
    world.controller.handle(Apply({P: 1, D: 1}))
    assert len(world.actors) == 1
    world.controller.handle(Shutdown())
    await world.settle()
    assert world.fleet.is_stopped
    assert world.controller.processes == {}
    assert len(world.actors) == 1


async def test_a_worker_that_becomes_ready_while_stopping_gets_no_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.controller.handle(Apply({P: 1, D: 1}))
    spec = world.actor("worker-0").spec
    assert world.introduce(spec)
    world.actor("worker-0").is_frozen = True
    world.controller.handle(Shutdown())
    world.say(spec, Ready(info=worker_info("worker-0", D, incarnation=spec.incarnation)))
    assert world.service.router.status(0.0).workers == ()


async def test_a_new_controller_adopts_running_workers_and_ends_replaced_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, num_cores=3, stable_s=0.0)
    world.up()
    frozen = world.actor("worker-0")
    frozen.is_frozen = True
    world.disconnect("worker-0")
    await world.settle()
    newest = world.actor("worker-0")
    assert newest is not frozen
    frozen.ended = asyncio.get_running_loop().create_future()  # the head died before it had killed it
    world.start_controller(monkeypatch, Router(adopts=True), num_cores=3)
    world.controller.adopt(await world.keeper.living())
    world.controller.handle(Apply({P: 1, D: 1}))
    world.connect("worker-1")
    assert not world.controller.adopted.is_set()
    world.connect("worker-0")
    assert world.controller.adopted.is_set()
    assert {worker.worker_id for worker in world.service.router.status(0.0).workers} == {
        "worker-1",
        "worker-0",
    }
    await world.settle()
    assert frozen.num_stops == 2
    assert len(world.actors) == 3


async def test_a_loading_worker_is_adopted_without_waiting_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.controller.handle(Apply({P: 1, D: 1}))
    world.connect("worker-1")
    spec = world.actor("worker-0").spec
    world.start_controller(monkeypatch, Router(adopts=True))
    world.controller.adopt(await world.keeper.living())
    world.controller.handle(Apply({P: 1, D: 1}))
    world.connect("worker-1")
    assert not world.controller.adopted.is_set()
    assert world.introduce(spec)
    world.say(
        spec, LoadProgress(worker_id="worker-0", incarnation=spec.incarnation, phase="loading", fraction=0.5)
    )
    assert world.controller.adopted.is_set()
    assert len(world.actors) == 2


async def test_nothing_is_started_once_the_controller_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, stable_s=0.0)
    world.up()
    await world.controller.close()
    world.disconnect("worker-0")
    await world.settle()
    assert len(world.actors) == 2
    assert all(actor.ended.done() for actor in world.actors)
    for actor in world.actors:
        actor.ended.exception()


async def test_a_worker_has_one_connection_its_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.controller.handle(Apply({P: 1, D: 1}))
    spec = world.actor("worker-0").spec
    assert world.introduce(spec)
    first = world.service.sessions.connection(spec.key)
    assert world.introduce(spec)
    assert isinstance(first, FakeConnection) and first.is_closed


async def test_an_unexplained_loss_of_a_worker_makes_its_host_suspect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, stable_s=0.0)
    world.up()
    world.actor("worker-0").end(RayTaskError("run", "traceback", CheckpointError("layer 3 is gone")))
    await world.settle()
    assert world.suspected == [], "it said why"
    world.disconnect("worker-1")
    assert world.suspected == ["node"]
    await world.settle()
    assert world.suspected == ["node"], "it ended because we ended it"
    world.actor("worker-1").end(ActorDiedError())
    await world.settle()
    assert world.suspected == ["node", "node"]


async def test_a_workers_report_of_a_full_host_reaches_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.up()
    full = (("/tmp", 1 << 30),)
    report = HostFull(worker_id="worker-0", incarnation=1, full=full)
    world.say(world.actor("worker-0").spec, report)
    assert world.full == [("node", full)]
    assert world.state("worker-0") is MemberState.READY


async def test_a_worker_waits_indefinitely_for_a_host_to_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, num_cores=1)
    world.controller.handle(Apply({P: 1, D: 1}))
    (waiting,) = (
        key for key, process in world.controller.processes.items() if process.state is ProcessState.WAITING
    )
    assert world.controller.phase(waiting).startswith(f"waiting: {waiting[0]} needs 1 core(s)")
    world.places.cores.open("another", Capacity(1))
    world.controller.handle(Tick())
    assert [actor.spec.key for actor in world.actors][-1] == waiting
    assert next(m.num_restarts for m in world.fleet.status() if m.worker_id == waiting[0]) == 0
