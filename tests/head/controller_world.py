"""A controller over actors that a test controls."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pdserve.cluster.actors import outcome_of
from pdserve.core.config import ClusterConfig
from pdserve.core.messages import Hello, Ready, Role, WorkerMessage
from pdserve.head.controller import Controller
from pdserve.head.ports import Outcome, Version
from pdserve.router import supervisor
from pdserve.router.core import Router
from pdserve.router.cores import Capacity, CoreAllocator, Placement
from pdserve.router.events import WorkerLost
from pdserve.router.fleet import Fleet, FleetConfig
from pdserve.router.fleet_events import Apply, StartWorker
from pdserve.router.fleet_member import MemberState
from pdserve.router.places import Places
from pdserve.router.service import RouterService
from pdserve.worker.spec import WorkerSpec

from ..router.cluster import worker_info

P, D = Role.PREFILL, Role.DECODE


class FakeActor:
    """A worker's actor, whose `run` ends on request of the test, `stop` or a kill."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.is_frozen = False
        self.num_stops = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        self.num_stops += 1
        if not self.is_frozen:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


class FakeConnection:
    """A worker's connection; messages are discarded."""

    is_closed = False

    def send(self, message: object) -> None: ...
    def hang_up(self) -> None:
        self.is_closed = True


class FakeKeeper:
    """A keeper that records the actors that it made."""

    def __init__(self) -> None:
        self.actors: list[FakeActor] = []
        self._config, self._version = ClusterConfig(), (0, 0)

    def start(self, spec: WorkerSpec, placement: Placement) -> None:
        self.actors.append(FakeActor(replace(spec, cores=placement.cores)))

    async def ended(self, key: tuple[str, int]) -> Outcome:
        return await outcome_of(asyncio.shield(self._actor(key).ended))

    def stop(self, key: tuple[str, int]) -> None:
        self._actor(key).stop()

    def kill(self, key: tuple[str, int]) -> None:
        self._actor(key).end(ActorDiedError())

    async def living(self) -> list[tuple[WorkerSpec, Placement]]:
        return [
            (actor.spec, Placement("node", actor.spec.cores))
            for actor in self.actors
            if not actor.ended.done()
        ]

    async def config(self) -> ClusterConfig:
        return self._config

    def remember(self, config: ClusterConfig, version: Version) -> None:
        if version > self._version:
            self._config, self._version = config, version

    def _actor(self, key: tuple[str, int]) -> FakeActor:
        return next(actor for actor in self.actors if actor.spec.key == key)


class World:
    """A controller and a router's service around fake actors, on `num_cores` cores; every instance takes
    one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_cores: int = 2, **fleet: Any) -> None:
        self.keeper = FakeKeeper()
        self.stood_still_s = 0.0  # how long since our last beat, when a connection closes
        self.fleet_events: list[Any] = []
        monkeypatch.setattr(supervisor, "STOP_TIMEOUT_S", 0.01)
        self.start_controller(monkeypatch, Router(), num_cores, **fleet)

    def start_controller(
        self, monkeypatch: pytest.MonkeyPatch, router: Router, num_cores: int = 2, **fleet: Any
    ) -> None:
        self.fleet = Fleet(FleetConfig(**fleet))
        self.places = Places(CoreAllocator({"node": Capacity(num_cores)}))
        self.suspected: list[str] = []
        self.full: list[tuple[str, object]] = []
        self.controller = Controller(
            self.fleet,
            self.places,
            self.keeper,
            _spec,
            lambda: None,
            self.suspected.append,
            lambda node_id, full: self.full.append((node_id, full)),
        )
        self.service = RouterService(router, self.controller, "secret")
        self.controller.attach(self.service)
        handle = self.fleet.handle
        monkeypatch.setattr(
            self.fleet,
            "handle",
            lambda event, now_s: (self.fleet_events.append(event), handle(event, now_s))[1],
        )

    @property
    def actors(self) -> list[FakeActor]:
        return self.keeper.actors

    def actor(self, worker_id: str) -> FakeActor:
        """Returns the newest actor of this name."""
        return next(actor for actor in reversed(self.actors) if actor.spec.worker_id == worker_id)

    def connect(self, worker_id: str) -> None:
        """The worker sends Hello and Ready."""
        spec = self.actor(worker_id).spec
        self.introduce(spec)
        self.say(spec, Ready(info=worker_info(worker_id, spec.role, incarnation=spec.incarnation)))

    def introduce(self, spec: WorkerSpec) -> bool:
        """A worker sends Hello on a new connection; returns whether it is admitted."""
        sessions: Any = self.service.sessions
        connection = FakeConnection()
        self.service.carry_out(sessions.opened(connection, 0.0))
        self.service.carry_out(sessions.received(connection, hello(spec)))
        return sessions.connection(spec.key) is connection

    def say(self, spec: WorkerSpec, message: WorkerMessage) -> None:
        """Sends a message on the worker's connection."""
        sessions: Any = self.service.sessions
        self.service.carry_out(sessions.received(sessions.connection(spec.key), message))

    def disconnect(
        self, worker_id: str, reason: str = "connection closed", num_silent_beats: int = 0
    ) -> None:
        """Its connection breaks, or it is silent for the given number of beats."""
        self.break_off(self.actor(worker_id).spec, reason, num_silent_beats)

    def break_off(
        self, spec: WorkerSpec, reason: str = "connection closed", num_silent_beats: int = 0
    ) -> None:
        sessions: Any = self.service.sessions
        connection = sessions.connection(spec.key)
        for _ in range(num_silent_beats):
            self.service.carry_out(sessions.beat(connection, 0.0))
        self.service.carry_out(
            sessions.closed(connection, None if num_silent_beats else reason, self.stood_still_s)
        )

    def up(self) -> None:
        self.controller.handle(Apply({P: 1, D: 1}))
        self.connect("worker-1")
        self.connect("worker-0")

    def state(self, worker_id: str) -> MemberState | None:
        return next((member.state for member in self.fleet.status() if member.worker_id == worker_id), None)

    def error(self, worker_id: str) -> str | None:
        return next(member.last_error for member in self.fleet.status() if member.worker_id == worker_id)

    def losses(self, worker_id: str) -> list[WorkerLost]:
        return [
            event
            for event in self.fleet_events
            if isinstance(event, WorkerLost) and event.worker_id == worker_id
        ]

    async def settle(self) -> None:
        """Waits until only waiting for actors is left."""
        for _ in range(10):
            await asyncio.sleep(0)


def _spec(action: StartWorker) -> WorkerSpec:
    config = ClusterConfig.model_validate({})
    return WorkerSpec(
        worker_id=action.worker_id,
        incarnation=action.incarnation,
        role=action.role,
        config=config,
        device="cpu",
        num_blocks=8,
        router_address=("127.0.0.1", 1),
        token="secret",
        host=None,
    )


def hello(spec: WorkerSpec) -> Hello:
    return Hello(worker_id=spec.worker_id, incarnation=spec.incarnation)
