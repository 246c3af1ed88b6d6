"""Carries out the supervisor's decisions about workers' processes: starts, watches, stops and kills them
through the keeper.

Runs on the head's asyncio loop. Events come from workers' connections (through the router's service), from
the keeper, and from the head.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from ..core.pump import CommandPump
from ..router.cores import Key, Placement
from ..router.events import Tick
from ..router.fleet import Fleet
from ..router.fleet_events import StartWorker
from ..router.places import Places
from ..router.service import RouterService
from ..router.supervisor import (
    AdoptProcesses,
    ConnectionLost,
    EndProcess,
    KillProcess,
    LaunchProcess,
    ProcessEnded,
    RefuseHost,
    SupervisedProcess,
    Supervisor,
    SupervisorCommand,
    SupervisorEvent,
    SuspectHost,
)
from ..worker.spec import WorkerSpec
from .ports import Keeper

log = logging.getLogger(__name__)


class Controller:
    """The supervisor's shell: timers, the keeper's processes, and the link to the router."""

    def __init__(
        self,
        fleet: Fleet,
        places: Places,
        keeper: Keeper,
        make_spec: Callable[[StartWorker], WorkerSpec],
        on_change: Callable[[], None],
        suspect_host: Callable[[str], None] = lambda node_id: None,
        refuse_host: Callable[[str, tuple[tuple[str, int], ...]], None] = lambda node_id, full: None,
    ) -> None:
        """`suspect_host` is called with the node id of a host on which a worker was lost for no known reason,
        `refuse_host` with that of a host which is full, and its full parts."""
        self.fleet = fleet
        self.adopted = asyncio.Event()  # each process of an earlier controller has reported, or is given up
        self._supervisor = Supervisor(fleet, places, make_spec)
        self._keeper = keeper
        self._on_change = on_change
        self._suspect_host = suspect_host
        self._refuse_host = refuse_host
        self._service: RouterService | None = None
        self._pump: CommandPump[SupervisorCommand[WorkerSpec]] = CommandPump(self._carry_out, self._settle)
        self._is_closed = False
        self._tick: asyncio.TimerHandle | None = None
        self._watching: dict[Key, asyncio.Task[None]] = {}

    @property
    def processes(self) -> Mapping[Key, SupervisedProcess[WorkerSpec]]:
        """The processes, oldest first."""
        return self._supervisor.processes

    def expects(self, key: Key) -> bool:
        """Whether a worker that identifies itself by `key` may serve."""
        return self._supervisor.expects(key)

    def phase(self, key: Key) -> str:
        """Returns what a worker's process is doing until it serves."""
        return self._supervisor.phase(key)

    def attach(self, service: RouterService) -> None:
        """Attaches the router that these workers serve."""
        self._service = service

    def adopt(self, living: Sequence[tuple[WorkerSpec, Placement]]) -> None:
        """Takes over the processes of an earlier controller, oldest first. Only the newest of each name is
        kept."""
        for spec, _ in living:
            self._watch(spec.key)
        self.handle(AdoptProcesses(tuple(living)))

    def handle(self, event: SupervisorEvent[WorkerSpec]) -> None:
        """Passes one event through the supervisor and carries out its commands. Commands that result from a
        re-entrant call are carried out after those decided before."""
        if self._is_closed:
            return
        if isinstance(event, ConnectionLost) and self._supervisor.is_serving(event.key):
            what = "is away, and expected back" if event.comes_back else "is lost"
            log.warning("%s/%d %s: %s", *event.key, what, event.reason, extra={"worker": event.worker_id})
        if not self._pump.run(self._supervisor.handle(event, asyncio.get_running_loop().time())):
            return
        if self._supervisor.is_adopted:
            self.adopted.set()
        self._schedule_tick()
        self._on_change()

    async def close(self) -> None:
        """Kills all running processes, and starts no more."""
        self._is_closed = True
        if self._tick is not None:
            self._tick.cancel()
        watching = dict(self._watching)
        for watch in watching.values():
            watch.cancel()
        await asyncio.gather(*watching.values(), return_exceptions=True)
        for key in watching:
            self._keeper.kill(key)

    # commands

    def _carry_out(self, command: SupervisorCommand[WorkerSpec]) -> None:
        match command:
            case LaunchProcess(spec, placement):
                self._keeper.start(spec, placement)
                self._watch(spec.key)
            case EndProcess(key):
                self._keeper.stop(key)
            case KillProcess(key):
                self._keeper.kill(key)
            case SuspectHost(node_id):
                self._suspect_host(node_id)
            case RefuseHost(node_id, full):
                self._refuse_host(node_id, full)
            case _:
                assert self._service is not None, "attach() must be called first"
                self._service.handle(command)

    def _settle(self) -> list[SupervisorCommand[WorkerSpec]]:
        return self._supervisor.settle(asyncio.get_running_loop().time())

    def _watch(self, key: Key) -> None:
        work: Coroutine[Any, Any, None] = self._follow(key)
        self._watching[key] = asyncio.get_running_loop().create_task(work)
        self._watching[key].add_done_callback(lambda _: self._watching.pop(key))

    async def _follow(self, key: Key) -> None:
        """Follows one process until it ends, for whatever reason."""
        outcome = await self._keeper.ended(key)
        if self._supervisor.expects(key):
            log.warning("%s/%d ended: %s", *key, outcome.reason, extra={"worker": key[0]})
        else:  # how is no news: Ray calls an actor that it has killed one that died unexpectedly
            log.info("%s/%d ended, as expected", *key, extra={"worker": key[0]})
        self.handle(ProcessEnded(*key, outcome.reason, outcome.is_reported, outcome.has_died))

    def _schedule_tick(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        due_s = self._supervisor.next_tick_s()
        loop = asyncio.get_running_loop()
        self._tick = None if due_s is None else loop.call_at(due_s, self.handle, Tick())
