"""Carries out what the fleet decides: Ray actors on cores of their own, started, watched and ended.

Runs on the head's asyncio loop. Events come from workers' connections (through the router's service) and from Ray.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import ClusterConfig
from ..core.errors import CapacityError
from ..core.messages import Role, WorkerInfo
from ..router.events import Tick, WorkerDraining, WorkerIdle, WorkerLost, WorkerReady, WorkerRole, WorkersExpected
from ..router.fleet import Fleet
from ..router.fleet_events import (
    AssignRole,
    DrainWorker,
    FleetAction,
    FleetEvent,
    StartWorker,
    StopWorker,
    WorkerStartFailed,
    WorkerStopped,
)
from ..router.service import RouterService
from .actors import WorkerActor
from .cores import CoreAllocator
from .worker_spec import WorkerSpec

log = logging.getLogger(__name__)

WORKER = "pdserve.cluster.worker_process:WorkerProcess"
STOP_TIMEOUT_S = 5.0  # a worker that does not end by itself is killed after this


@dataclass
class Process:
    """One incarnation of a worker, as an actor."""

    info: WorkerInfo | None = None
    phase: str = "starting a process"
    fraction: float = 0.0
    started_s: float = 0.0
    actor: Any = None
    watch: "asyncio.Task[None] | None" = None


class Controller:
    """Observes workers for the fleet, and does what it says."""

    def __init__(
        self,
        fleet: Fleet,
        cores: CoreAllocator,
        make_spec: Callable[[StartWorker, tuple[int, ...]], WorkerSpec],
        on_change: Callable[[], None],
    ) -> None:
        self.fleet = fleet
        self.processes: dict[tuple[str, int], Process] = {}
        self._cores = cores
        self._make_spec = make_spec
        self._on_change = on_change
        self._service: RouterService | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, service: RouterService) -> None:
        """The router whose workers these are."""
        self._service = service

    def handle(self, event: FleetEvent) -> None:
        """One event through the fleet, its actions carried out."""
        loop = asyncio.get_running_loop()
        for action in self.fleet.handle(event, loop.time()):
            self._carry_out(action, loop.time())
        self._router(WorkersExpected(self.fleet.num_expected))
        self._schedule_tick(loop)
        self._on_change()

    async def close(self) -> None:
        """Kill whatever still runs."""
        if self._tick is not None:
            self._tick.cancel()
        watches = [process.watch for process in self.processes.values() if process.watch is not None]
        for task in (*watches, *self._tasks):
            task.cancel()
        await asyncio.gather(*watches, *self._tasks, return_exceptions=True)
        for process in self.processes.values():
            ray.kill(process.actor)

    # what the router's service tells of workers

    def expects(self, worker_id: str, incarnation: int) -> bool:
        return (worker_id, incarnation) in self.processes

    def worker_progress(self, worker_id: str, incarnation: int, phase: str, fraction: float) -> None:
        process = self.processes.get((worker_id, incarnation))
        if process is not None:
            process.phase, process.fraction = phase, fraction
            self._on_change()

    def worker_ready(self, info: WorkerInfo) -> None:
        process = self.processes.get((info.worker_id, info.incarnation))
        if process is not None:
            process.info, process.phase, process.fraction = info, "", 1.0
            self.handle(WorkerReady(info))

    def worker_lost(self, worker_id: str, incarnation: int, reason: str) -> None:
        process = self.processes.get((worker_id, incarnation))
        if process is not None and process.info is not None:
            self.handle(WorkerLost(worker_id, incarnation, reason))
            self._spawn(self._stop(worker_id, incarnation))  # frozen perhaps; a new incarnation needs its cores

    def worker_idle(self, worker_id: str, incarnation: int) -> None:
        self.handle(WorkerIdle(worker_id, incarnation))

    # actions

    def _carry_out(self, action: FleetAction, now_s: float) -> None:
        match action:
            case StartWorker():
                self._start(action, now_s)
            case DrainWorker(worker_id):
                self._router(WorkerDraining(worker_id))
            case AssignRole(worker_id, role):
                self._router(WorkerRole(worker_id, role))
            case StopWorker(worker_id, incarnation):
                self._spawn(self._stop(worker_id, incarnation))

    def _start(self, action: StartWorker, now_s: float) -> None:
        key = (action.worker_id, action.incarnation)
        spec_of_cores = self._make_spec(action, ())
        pool = spec_of_cores.pool
        num_cores = pool.devices_per_instance
        try:
            placement = self._cores.take(key, num_cores, min(1.0, pool.num_cpus / num_cores))
        except CapacityError as error:
            asyncio.get_running_loop().call_soon(self.handle, WorkerStartFailed(*key, str(error)))
            return
        spec = self._make_spec(action, placement.cores)
        actor = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=pool.num_cpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(placement.node_id, soft=False),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(pool.num_threads)}},
        ).remote(WORKER, spec)
        process = Process(actor=actor, started_s=now_s)
        self.processes[key] = process
        process.watch = asyncio.get_running_loop().create_task(self._watch(key, actor.run.remote()))

    async def _watch(self, key: tuple[str, int], run: Any) -> None:
        """Follow one actor to its end, whatever that is."""
        reason = "the process ended"
        try:
            await run
        except RayTaskError as error:
            reason = _cause(error)
            log.error("%s/%d failed: %s", *key, error)
        except RayActorError as error:
            reason = f"the process died: {str(error).splitlines()[0]}"
        process = self.processes.pop(key)
        ray.kill(process.actor)
        self._cores.give_back(key)
        assert self._service is not None
        self._service.handle(WorkerLost(*key, reason))
        member = next((m for m in self.fleet.status() if m.worker_id == key[0]), None)
        stopping = member is not None and member.state.value == "stopping"
        self.handle(WorkerStopped(*key) if stopping else WorkerLost(*key, reason))

    async def _stop(self, worker_id: str, incarnation: int) -> None:
        process = self.processes.get((worker_id, incarnation))
        if process is None or process.watch is None:
            return
        process.actor.stop.remote()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.watch), STOP_TIMEOUT_S)
            return
        ray.kill(process.actor)

    def _router(self, event: WorkersExpected | WorkerDraining | WorkerRole) -> None:
        assert self._service is not None, "attach() comes first"
        self._service.handle(event)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _schedule_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._tick is not None:
            self._tick.cancel()
        due_s = self.fleet.next_tick_s()
        self._tick = None if due_s is None else loop.call_at(due_s, self.handle, Tick())


def _cause(error: RayTaskError) -> str:
    """The error inside an actor in one line."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}" if cause is not None else str(error).strip().splitlines()[-1]


def pool_sizes(config: ClusterConfig) -> Mapping[Role, int]:
    return {role: pool.instances for role, pool in config.pools.items()}
