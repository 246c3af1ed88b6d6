"""Lets accidents happen: each hits a process, a connection, a host, or the cluster's desired sizes."""

from collections.abc import Sequence
from typing import Protocol

from ..core.messages import Role
from ..router.fleet_events import Drain
from ..router.fleet_member import MemberState
from . import rank_accidents
from .faults import Accident, Faults
from .network import Network
from .rank_accidents import PlannedRankAccident
from .scenario import PlannedAccident, Scenario
from .simulated_head import SimulatedHead
from .simulated_hosts import SimulatedHost, SimulatedHosts
from .simulated_worker import SimulatedWorker
from .virtual_time import VirtualTime

SIZES = ((1, 1), (2, 1), (1, 2), (3, 2), (0, 1), (1, 0), (0, 2), (2, 0))  # the last is not drawn
MAX_SIZE = 3  # of those; larger pools are resized to multiples
TOLD_S = 0.2  # within which the router hears of a crash


class AccidentWorld(Protocol):
    """The parts of a simulation that accidents touch."""

    scenario: Scenario
    time: VirtualTime
    faults: Faults
    network: Network
    hosts: SimulatedHosts
    head: SimulatedHead
    pools: dict[Role, int]  # the desired sizes

    def alive(self) -> Sequence[SimulatedWorker]: ...
    def apply(self, pools: dict[Role, int]) -> None: ...
    def restart_head(self) -> None: ...
    def violation(self, text: str) -> None: ...
    def note(self, text: str) -> None:
        """Adds a line to the timeline."""
        ...


class Accidents:
    """Strikes a simulated cluster as its scenario plans it."""

    def __init__(self, world: AccidentWorld) -> None:
        self._world = world

    def strike_rank(self, accident: PlannedRankAccident) -> None:
        world = self._world
        instances = [worker.transfers for worker in world.alive()]
        name = rank_accidents.strike(accident, instances, world.faults, world.network)
        world.note(f"ACCIDENT {accident.kind.value}: {name}, {accident.duration_s} s")

    def strike(self, accident: PlannedAccident) -> None:
        world = self._world
        workers = world.alive()
        if not workers:
            return
        worker = workers[int(accident.draw * len(workers)) % len(workers)]
        name, seconds = worker.process.name, accident.duration_s
        world.faults.count(accident.kind.value)
        world.note(f"ACCIDENT {accident.kind.value}: {name}, {seconds} s")
        match accident.kind:
            case Accident.KILL:
                worker.process.kill()
            case Accident.FREEZE:
                worker.process.stand_still(seconds)
            case Accident.ROUTER_FREEZE:
                world.head.process.stand_still(seconds)
            case Accident.ROUTER_RESTART:
                self._kill_head(world.head, min(seconds, 2.0), amid_dispatch=accident.draw * 1000 % 1 < 0.5)
            case Accident.SLOW:
                worker.clock.factor = 20.0
                world.time.call_later(seconds, lambda: setattr(worker.clock, "factor", 1.0))
            case Accident.HANG:
                worker.hangs = True
            case Accident.CRASH:
                worker.crash()
                if world.scenario.has_crashes_alone:
                    world.time.call_later(TOLD_S, lambda: self._check_told(worker))
            case Accident.PARTITION_ROUTER:
                world.network.partition("router", name, seconds)
            case Accident.PARTITION_WORKERS:
                other = workers[int(accident.draw * 7919) % len(workers)]
                world.network.partition(other.process.name, name, seconds)
            case Accident.CUT:
                world.network.cut(worker.process)
            case Accident.CUT_TRANSFERS:
                world.network.cut(worker.process, spared=world.head.process)
            case Accident.DRAIN:
                members = world.head.fleet.status()
                num_ready = sum(member.state is MemberState.READY for member in members)
                # else no worker might be left
                if num_ready > 2 and world.head.process.is_alive and world.head.fleet.is_settled:
                    world.head.manage(Drain(worker.spec.worker_id))
            case Accident.HOST_DOWN | Accident.HOST_CUT | Accident.HOSTS_PARTED | Accident.HOST_REMOVED:
                self._strike_host(accident)
            case Accident.SCALE:
                factor = max(1, max(world.scenario.pools.values()) // MAX_SIZE)
                sizes = tuple(factor * size for size in SIZES[int(accident.draw * 7)])
                world.apply(dict(zip(world.scenario.pools, sizes, strict=True)))

    def _strike_host(self, accident: PlannedAccident) -> None:
        world = self._world
        if not world.hosts.others:
            return
        host = world.hosts.others[int(accident.draw * 7919) % len(world.hosts.others)]
        world.note(f"it is {host.name}")
        match accident.kind:
            case Accident.HOST_DOWN:
                world.hosts.take_down(host, accident.duration_s)
            case Accident.HOST_CUT:
                host.cut_until_s = world.time.now_s + accident.duration_s
                for worker in world.hosts.on(host):
                    world.network.partition("router", worker.process.name, accident.duration_s)
            case Accident.HOSTS_PARTED:  # as by a firewall: each of them reaches the head
                others = world.hosts.hosts[: world.hosts.hosts.index(host)]
                other = others[int(accident.draw * 104729) % len(others)]
                for a in world.hosts.on(host):
                    for b in world.hosts.on(other):
                        world.network.partition(a.process.name, b.process.name, accident.duration_s)
            case Accident.HOST_REMOVED:
                host.is_listed = False
                world.apply(world.pools)
                world.time.call_later(accident.duration_s, lambda: self._add_host(host))

    def _add_host(self, host: SimulatedHost) -> None:
        if not host.is_listed:
            host.is_listed = True
            self._world.apply(self._world.pools)

    def _kill_head(self, head: SimulatedHead, seconds: float, *, amid_dispatch: bool) -> None:
        """Kills the head; there is none for `seconds`. `amid_dispatch`: it dies amid its next commands, if
        they come soon, half of which are lost."""

        def kill() -> None:
            if not head.process.is_alive:
                return
            if amid_dispatch:
                self._world.network.lose_last_words(head.process)
            clients = head.clients.values()
            head.process.kill()
            for client in clients:
                client.on_lost()
            self._world.time.call_later(seconds, self._world.restart_head)

        if amid_dispatch:
            head.on_dispatch = lambda: self._world.time.call_later(0.0, kill)
        self._world.time.call_later(0.2 if amid_dispatch else 0.0, kill)

    def _check_told(self, worker: SimulatedWorker) -> None:
        if worker.spec.key in self._world.head.connected():
            self._world.violation(f"the router has not heard of the crash of {worker.spec}")
