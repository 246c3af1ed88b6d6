"""Carries out what the fleet decides: Ray actors on cores of their own, started, watched and ended.

Runs on the head's asyncio loop. Events come from workers' connections (through the router's service) and from Ray.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.messages import WorkerInfo
from ..core.pump import CommandPump
from ..router.cores import Placement
from ..router.events import (
    Adopted,
    Tick,
    WorkerDraining,
    WorkerIdle,
    WorkerLost,
    WorkerReady,
    WorkerRole,
    WorkersExpected,
)
from ..router.fleet import Fleet
from ..router.fleet_events import (
    AdoptWorkers,
    Apply,
    AssignRole,
    DrainWorker,
    FleetAction,
    FleetEvent,
    StartWorker,
    StopWorker,
    WorkerLoading,
    WorkerPlaced,
)
from ..router.places import Places
from ..router.service import RouterService
from ..worker.spec import WorkerSpec
from .ports import Keeper, Key

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # a worker that does not end by itself is killed after this


@dataclass
class Process:
    """One incarnation of a worker, from StartWorker, or from when it was taken over, until its process is gone."""

    spec: WorkerSpec
    started_s: float
    phase: str = "starting a process"
    fraction: float = 0.0
    info: WorkerInfo | None = None  # None until it is ready
    watch: "asyncio.Task[None] | None" = None  # None until there are cores for it
    ending: str | None = None  # why it was told to end


class Controller:
    """Observes workers for the fleet, and does what it says. Each process that was started is reported lost in the end,
    whoever wanted it, and only then are its cores given to another."""

    def __init__(
        self,
        fleet: Fleet,
        places: Places,
        keeper: Keeper,
        make_spec: Callable[[StartWorker], WorkerSpec],
        on_change: Callable[[], None],
        suspect_host: Callable[[str], None] = lambda node_id: None,
    ) -> None:
        """`suspect_host` is called with the node id of a host on which a worker was lost for no known reason."""
        self.fleet = fleet
        self.processes: dict[Key, Process] = {}  # oldest first
        self.adopted = asyncio.Event()  # whatever an earlier controller has started was heard of, or is given up
        self._places = places
        self._suspect_host = suspect_host
        self._keeper = keeper
        self._make_spec = make_spec
        self._on_change = on_change
        self._service: RouterService | None = None
        self._pump: CommandPump[FleetAction | WorkersExpected] = CommandPump(self._carry_out, self._give_places)
        self._is_closed = False
        self._tick: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, service: RouterService) -> None:
        """The router whose workers these are."""
        self._service = service

    def adopt(self, living: Sequence[tuple[WorkerSpec, Placement]]) -> None:
        """Take over what an earlier controller has started, oldest first. Of one name only the newest is kept."""
        loop = asyncio.get_running_loop()
        newest = {spec.worker_id: spec for spec, _ in living}
        for spec, placement in living:
            self._places.adopt(spec.key, spec.role, placement, spec.need)
            process = self.processes[spec.key] = Process(spec, loop.time(), phase="reconnecting")
            process.watch = self._spawn(self._watch(spec.key))
            if newest[spec.worker_id] is not spec:
                self._stop(spec.key, "replaced", STOP_TIMEOUT_S)
        self.handle(AdoptWorkers(tuple(StartWorker(spec.role, *spec.key) for spec in newest.values())))

    def handle(self, event: FleetEvent) -> None:
        """One event through the fleet, its actions carried out. What follows from an action that leads here again is
        carried out after the actions that were decided before."""
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()
        if isinstance(event, Apply):
            self._places.wanted = event.pools
        actions = self.fleet.handle(event, loop.time())
        # the router hears what to expect before workers drain whom others are to replace
        if not self._pump.run([WorkersExpected(self.fleet.num_expected), *actions]):
            return
        if self.fleet.is_settled and not self.adopted.is_set():
            self.adopted.set()
            self._router(Adopted())
        self._router(WorkersExpected(self.fleet.num_expected))
        self._schedule_tick(loop)
        self._on_change()

    async def close(self) -> None:
        """Kill whatever still runs, and start nothing more."""
        self._is_closed = True
        if self._tick is not None:
            self._tick.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for key, process in self.processes.items():
            if process.watch is not None:
                self._keeper.kill(key)

    # what the router's service tells of workers

    def expects(self, worker_id: str, incarnation: int) -> bool:
        process = self.processes.get((worker_id, incarnation))
        return process is not None and process.ending is None

    def worker_progress(self, worker_id: str, incarnation: int, phase: str, fraction: float) -> None:
        process = self.processes.get((worker_id, incarnation))
        if process is not None:
            process.phase, process.fraction = phase, fraction
            if not self.adopted.is_set():
                self.handle(WorkerLoading(worker_id, incarnation))
            self._on_change()

    def worker_ready(self, info: WorkerInfo) -> None:
        process = self.processes[info.worker_id, info.incarnation]
        process.info, process.phase, process.fraction = info, "", 1.0
        self.handle(WorkerReady(info))

    def worker_lost(self, worker_id: str, incarnation: int, reason: str, is_silent: bool) -> None:
        """A connection is gone. One that was to end, or has not begun to serve, tells more by the end of its process. One
        that fell silent may be frozen, and a new incarnation needs its cores: it is not asked to end, but killed."""
        process = self.processes.get((worker_id, incarnation))
        if process is not None and process.info is not None and process.ending is None:
            log.warning("%s/%d is lost: %s", worker_id, incarnation, reason, extra={"worker": worker_id})
            self._suspect((worker_id, incarnation))
            self.handle(WorkerLost(worker_id, incarnation, reason))
            self._stop((worker_id, incarnation), reason, 0.0 if is_silent else STOP_TIMEOUT_S)

    def worker_idle(self, worker_id: str, incarnation: int) -> None:
        self.handle(WorkerIdle(worker_id, incarnation))

    # actions

    def _carry_out(self, action: FleetAction | WorkersExpected) -> None:
        match action:
            case WorkersExpected():
                self._router(action)
            case StartWorker(role, worker_id, incarnation):
                key = worker_id, incarnation
                process = self.processes[key] = Process(self._make_spec(action), asyncio.get_running_loop().time())
                self._places.ask(key, role, process.spec.need)
            case DrainWorker(worker_id):
                self._router(WorkerDraining(worker_id))
            case AssignRole(worker_id, role):
                self._places.assign(worker_id, role)
                self._router(WorkerRole(worker_id, role))
            case StopWorker(worker_id, incarnation, reason):
                self._stop((worker_id, incarnation), reason, STOP_TIMEOUT_S)

    def _give_places(self) -> list[FleetAction]:
        """Start the actors for which there is room; the others wait. Returns what the fleet does about it."""
        actions: list[FleetAction] = []
        while (found := self._places.next()) is not None:
            key, placement = found
            process = self.processes[key]
            process.phase = "starting a process"
            self._keeper.start(process.spec, placement)
            process.watch = self._spawn(self._watch(key))
            actions += self.fleet.handle(WorkerPlaced(*key), asyncio.get_running_loop().time())
        for key in self._places.waiting:
            self.processes[key].phase = f"waiting: {self._places.why_waiting(key)}"
        return actions

    async def _watch(self, key: Key) -> None:
        """Follow one process to its end, whatever that is."""
        outcome = await self._keeper.ended(key)
        level = logging.WARNING if self.processes[key].ending is None else logging.INFO
        log.log(level, "%s/%d ended: %s", *key, outcome.reason, extra={"worker": key[0]})
        if not outcome.is_told and self.processes[key].ending is None:
            self._suspect(key)
        self._gone(key, outcome.reason if outcome.is_told else self.processes[key].ending or outcome.reason)

    def _suspect(self, key: Key) -> None:
        """The process ended, or its connection broke, and nobody knows why: its host may be in trouble."""
        node_id = self._places.cores.node_of(key)
        if node_id is not None:
            self._suspect_host(node_id)

    def _gone(self, key: Key, reason: str) -> None:
        """Nothing is left of a process: tell router and fleet, and give its cores to those who wait."""
        del self.processes[key]
        self._places.give_back(key)
        self._router(WorkerLost(*key, reason))
        self.handle(WorkerLost(*key, reason))

    def _stop(self, key: Key, reason: str, patience_s: float) -> None:
        process = self.processes.get(key)
        if process is None or process.ending is not None:
            return  # its end was told already, or will be
        process.ending = reason
        if process.watch is None:
            self._gone(key, reason)
        else:
            self._spawn(self._end(key, process.watch, patience_s))

    async def _end(self, key: Key, watch: "asyncio.Task[None]", patience_s: float) -> None:
        """Ask the process to end, then make it. `watch` tells of its end."""
        if patience_s:
            self._keeper.stop(key)
            _, alive = await asyncio.wait((watch,), timeout=patience_s)
            if not alive:
                return
        self._keeper.kill(key)

    def _router(self, event: Adopted | WorkersExpected | WorkerDraining | WorkerRole | WorkerLost) -> None:
        assert self._service is not None, "attach() comes first"
        self._service.handle(event)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _schedule_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._tick is not None:
            self._tick.cancel()
        due_s = self.fleet.next_tick_s()
        self._tick = None if due_s is None else loop.call_at(due_s, self.handle, Tick())
