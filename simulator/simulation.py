"""Simulates one seed from start to idle: builds the cluster, lets accidents happen, then waits until
everything is idle."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from ..core.messages import Role, TransferAddress
from ..core.reach import CONNECT_TIMEOUT_S
from ..engine.sequence import Sequence
from ..kv_transfer.config import TransferConfig
from ..kv_transfer.outbound import OutboundPair
from ..router.config import RouterConfig
from ..router.cores import Placement
from ..router.fleet import FleetConfig
from ..router.fleet_events import Apply, Drain
from ..router.fleet_member import MemberState
from ..router.planning import Ratio
from .faults import ORDERLY, Accident, Faults
from .leftovers import leftovers
from .network import ConnectionEnd, Network
from .rank_accidents import PlannedRankAccident, strike
from .scenario import (
    CALM_S,
    CONTEST_TOKENS,
    MAX_GRAY_FAILURES,
    Deadly,
    GrayKind,
    PlannedAccident,
    Scenario,
    Severed,
)
from .simulated_client import CONVICTED, SimulatedClient
from .simulated_head import SimulatedHead
from .simulated_hosts import SimulatedHost, SimulatedHosts
from .simulated_link import SimulatedDial
from .simulated_planner import SimulatedPlanner
from .simulated_ranks import SimulatedRank
from .simulated_worker import InstanceSpec, SimulatedWorker
from .virtual_time import VirtualProcess, VirtualTime

PATIENCE_S = 60.0  # from the last fault to the last ending, and until everything is free
MAX_UNFAIRNESS = 0.1  # of a client's share
MAX_REFUSALS = 5  # of one pair, before it is avoided, and when it is tried again
MAX_TURNS = 40  # of others, while a request is the first of its client: a large one waits for 5 s
MAX_EVENTS = 5_000_000
SIZES = ((1, 1), (2, 1), (1, 2), (3, 2), (0, 1), (1, 0), (0, 2), (2, 0))  # the last is not drawn
MAX_SIZE = 3  # of those; larger pools are resized to multiples
FOLLOWED = "ratio changed by the planner"
TOLD_S = 0.2  # within which the router hears of a crash
TAKE_OVER_TOKENS = 64  # so few that a take-over takes many turns


@dataclass
class SimulationOutcome:
    """The outcome of a simulation. `violations` is empty when every promise was kept."""

    seed: int
    violations: list[str] = field(default_factory=list)
    timeline: list[str] = field(default_factory=list)  # recorded on demand
    faults: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_tokens: int = 0
    num_resumed: int = 0
    num_preemptions: int = 0
    num_events: int = 0
    virtual_s: float = 0.0


class TooManyViolations(Exception):
    """Raised when this seed has nothing more to reveal."""


class Simulation:
    """A simulation of one scenario, to be run once."""

    def __init__(self, scenario: Scenario, *, keep_timeline: bool = False) -> None:
        self.outcome = SimulationOutcome(scenario.seed)
        self._scenario = scenario
        self.keeps_timeline = keep_timeline
        self.heard_s = scenario.heard_s
        self.rng = Random(scenario.seed + 1)
        self.time = VirtualTime(self.rng)
        self.faults = Faults(self.rng, scenario.rates)
        self._client_counts: Counter[str] = Counter()
        self.network = Network(self.time, self.faults)
        self.hosts = SimulatedHosts(self.time, Random(scenario.seed + 2), scenario.hosts, self.violation)
        self.workers: dict[tuple[str, int], SimulatedWorker] = {}
        self._pools = scenario.pools  # the desired sizes
        self._computed: set[tuple[str, int, int, int]] = set()  # (request id, seed, choice, index) of tokens
        self._num_started: Counter[str] = Counter()  # processes, by worker
        self._num_died = 0  # processes that did not end in order
        self._num_deadly = 0  # of those, of the deadly request
        self._generation = 0
        self._num_displaced_before = 0  # dispatches, by earlier heads
        self.head = self._make_head()
        self._planner = self._make_planner()
        self._ids: dict[str, SimulatedClient] = {}
        self.clients = [
            SimulatedClient(
                self.time, lambda: self.head, self._ids, plan, self.violation, self.note, self._count
            )
            for plan in scenario.requests
        ]

    def run(self) -> SimulationOutcome:
        """Runs to the end, or to a violation that makes further checks useless."""
        try:
            self._run()
        except TooManyViolations:
            pass
        except Exception as error:
            if not self.outcome.violations:
                self.violation(f"{type(error).__name__}: {error}")
            if self.keeps_timeline:
                raise
        outcome = self.outcome
        outcome.faults = self.faults.counts + self._client_counts
        outcome.num_requests = len(self.clients)
        outcome.num_tokens = sum(client.num_tokens for client in self.clients)
        outcome.num_resumed = sum(client.was_resumed for client in self.clients)
        outcome.num_preemptions = sum(worker.worker.load.num_preemptions for worker in self.workers.values())
        outcome.num_events, outcome.virtual_s = self.time.num_events, self.time.now_s
        return outcome

    def _check_shares(self) -> None:
        """Checks that clients have had tokens by their weights, once they have had enough of them, while each
        of them has a request that has not begun."""
        contest = self._scenario.contest
        had = dict.fromkeys(contest, 0.0)
        waits = set()
        for client in self.clients:
            if client.num_tokens:
                had[client.client] += client.service
            else:
                waits.add(client.client)
        share = sum(had.values()) / len(had)
        if share < CONTEST_TOKENS and waits == set(contest):
            self.time.call_later(0.5, self._check_shares)
            return
        if any(abs(tokens - share) > MAX_UNFAIRNESS * share for tokens in had.values()):
            self.violation(f"clients that always had something queued have had {had}")
        for client in self.clients:
            client.cancel()

    def violation(self, text: str) -> None:
        self.note(f"VIOLATION {text}")
        self.outcome.violations.append(f"{self.time.now_s:.6f}: {text}")
        if len(self.outcome.violations) >= 20:
            raise TooManyViolations

    def _count(self, kind: str) -> None:
        self._client_counts[kind] += 1

    def note(self, text: str) -> None:
        if self.keeps_timeline:
            self.outcome.timeline.append(f"{self.time.now_s:10.6f}  {text}")

    def _run(self) -> None:
        self.head.start(self._pools, ())
        if self._planner is not None:
            self._planner.configure(_ratio(self._pools))
            self._planner.start()
        if self._scenario.contest:
            self.time.call_at(2.5, self._check_shares)
        for accident in self._scenario.accidents:
            self.time.call_at(accident.at_s, lambda accident=accident: self._strike(accident))  # type: ignore[misc]
        for of_a_rank in self._scenario.rank_accidents:
            self.time.call_at(of_a_rank.at_s, partial(self._strike_rank, of_a_rank))
        while self.time.step(CALM_S):
            pass
        self.faults.calm()
        if self._planner is not None:
            self._planner.stop()
            self._client_counts[FOLLOWED] += self._planner.num_followed
        for host in self.hosts.hosts:
            host.is_listed = True
        self._apply(self._scenario.pools)  # drained workers come back
        if not self._wait_for(self._are_clients_done):
            waiting = [client.request_id for client in self.clients if not client.is_ended]
            self.violation(f"still waiting {PATIENCE_S:.0f} s after the last fault: {', '.join(waiting)}")
        if not self._wait_for(lambda: not self._leftovers()):
            for leftover in self._leftovers():
                self.violation(f"left behind: {leftover}")
        orderly = {accident.value for accident in ORDERLY}
        is_orderly = self.faults.counts.keys() <= orderly and not self._scenario.has_large_bodies
        if self.head.router.counters.retried and is_orderly:
            self.violation(f"{self.head.router.counters.retried} dispatches failed without a fault")
        if self._scenario.is_computed_once or self._scenario.has_large_bodies:
            for worker_id, num_started in self._num_started.items():
                if num_started > 1:
                    self.violation(f"{worker_id} was started again, though only the router failed")
        counters = self.head.router.counters
        gray, severed = self._scenario.gray, self._scenario.severed
        max_retried = MAX_GRAY_FAILURES if gray is None or gray.rate == 1.0 else len(self.clients)
        if severed is not None and not severed.is_silent:
            max_retried = MAX_REFUSALS
        if (gray or severed) and (counters.failed or counters.retried > max_retried):
            self.violation(
                f"{gray or severed} cost {counters.retried} dispatches and {counters.failed} streams"
            )
        for request_id in (plan.request.request_id for plan in self._scenario.requests if plan.is_counted):
            if (num_turns := self.head.turns.of(request_id)) > MAX_TURNS:
                self.violation(f"{request_id} had to wait for {num_turns} turns of others")
        if self._scenario.keeps_streams and counters.failed:
            self.violation(f"{counters.failed} streams were given up, which went on after each failure")
        num_convicted = self._client_counts[CONVICTED]
        # each takes a death of its own, after another one
        if num_convicted and num_convicted >= self._num_died:
            self.violation(f"{num_convicted} requests are to blame for {self._num_died} deaths")
        if self._scenario.deadly and not num_convicted:
            self.violation("the deadly request is not to blame")
        for member in self.head.fleet.status():
            if member.num_restarts > self._num_started[member.worker_id]:
                self.violation(
                    f"{member.worker_id} counts {member.num_restarts} restarts, more than its processes"
                )
        self.head.router.check_integrity()
        for worker in self._alive():
            worker.pool.check_integrity()

    def _make_head(self) -> SimulatedHead:
        scenario = self._scenario
        return SimulatedHead(
            self,
            VirtualProcess(self.time, "router"),
            RouterConfig(
                max_queued_requests=scenario.max_queued_requests,
                prefill_on_decode_factor=2.0 if scenario.prefill_on_decode else None,
                max_attempts=scenario.max_attempts,
                max_running_per_client=scenario.max_running_per_client,
                enforces_itl=scenario.enforces_itl,
                claim_timeout_s=10.0,  # longer than the router freezes
                take_over_tokens=TAKE_OVER_TOKENS,
            ),
            FleetConfig(drain_timeout_s=20.0, start_timeout_s=5.0, backoff_s=0.2, max_backoff_s=2.0),
            scenario.join_timeout_s,
            self._generation,
        )

    def _make_planner(self) -> SimulatedPlanner | None:
        plan = self._scenario.planner
        if plan is None:
            return None
        return SimulatedPlanner(
            self.time,
            Random(f"advice of {self._scenario.seed}"),
            plan,
            lambda: self.head,
            lambda ratio: self._apply(ratio.sizes),
            self.violation,
        )

    def _apply(self, pools: dict[Role, int]) -> None:
        self._pools = pools
        head = self.head
        if head.process.is_frozen:
            head.process.call_later(0.0, lambda: self._apply(self._pools))
        elif head.process.is_alive:
            if head.fleet.is_settled:
                head.expect_hosts()
            head.manage(Apply(pools))
            if self._planner is not None:
                self._planner.configure(_ratio(pools))

    @property
    def _num_displaced(self) -> int:
        """Returns the number of dispatches that gave up their places: tokens in flight then are
        recomputed."""
        return self._num_displaced_before + self.head.router.counters.displaced

    def _restart_head(self) -> None:
        self._generation += 1
        self._num_displaced_before = self._num_displaced
        self.head = self._make_head()
        self.note("the router is back")
        self.head.start(self._pools, self._alive())
        if self._planner is not None:
            self._planner.configure(_ratio(self._pools))

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        limit_s = self._scenario.end_of_faults_s + PATIENCE_S
        while not condition():
            for _ in range(20):
                if not self.time.step(limit_s):
                    return condition()
            if self.time.num_events > MAX_EVENTS:
                self.violation(f"{MAX_EVENTS} events without an end")
                return False
        return True

    def _are_clients_done(self) -> bool:
        return all(client.is_ended for client in self.clients)

    def _alive(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers.values() if worker.process.is_alive]

    def _leftovers(self) -> list[str]:
        return leftovers(self.head, self._alive(), self.time.now_s)

    # workers

    def start_worker(self, spec: InstanceSpec, placement: Placement) -> SimulatedWorker:
        scenario = self._scenario
        config = TransferConfig(
            chunk_bytes=scenario.chunk_bytes,
            ring_slots=scenario.ring_slots,
            lease_s=scenario.lease_s,
            max_links=scenario.max_links,
        )
        worker = SimulatedWorker(
            self,
            spec,
            placement,
            scenario.shape_of(spec.role, spec.worker_id),
            scenario.transport,
            config,
        )
        self.workers[spec.key] = worker
        self._num_started[spec.worker_id] += 1
        self.hosts.started(worker, placement, self.head.waits_for_its_first_place)
        worker.process.when_it_dies(lambda: self._note_death(worker))
        worker.start(scenario.start_s)
        return worker

    def _note_death(self, worker: SimulatedWorker) -> None:
        self.note(f"{worker.spec} died")
        self._num_died += not worker.has_ended_in_order

    def fails_store(self, worker_id: str) -> bool:
        return self._is_gray(GrayKind.STORE, worker_id) or self.faults.fails_store()

    def corrupts_chunk(self, *ends: str) -> bool:
        """Whether a chunk between these workers is altered under way."""
        return self._is_gray(GrayKind.CORRUPT, *ends) or self.faults.corrupts_chunk()

    def _is_gray(self, kind: GrayKind, *worker_ids: str) -> bool:
        gray = self._scenario.gray
        if (
            gray is None
            or gray.kind is not kind
            or gray.worker_id not in worker_ids
            or self.rng.random() >= gray.rate
        ):
            return False
        self.faults.count(f"gray worker: {kind.value}")
        return True

    def dial(self, source: SimulatedRank, pair: OutboundPair, epoch: int) -> SimulatedDial:
        source_id, target_id = source.worker_id, pair.target.worker_id
        worker = self.workers.get((target_id, pair.target.incarnation))
        target = None if worker is None else worker.ranks[pair.target.rank]
        corrupts = partial(self.corrupts_chunk, source_id, target_id)
        severed = self._severed(source_id, target_id)
        if severed is not None:
            self.faults.count("pair that cannot connect")
        return SimulatedDial(self.network, source, target, pair, epoch, corrupts, severed)

    def _severed(self, source_id: str, target_id: str) -> Severed | None:
        severed = self._scenario.severed
        is_it = severed is not None and (severed.prefill, severed.decode) == (source_id, target_id)
        return severed if is_it else None

    def connect(self, worker: SimulatedWorker) -> ConnectionEnd | None:
        if not self.head.process.is_alive or self.head.process.is_frozen:
            return None
        ours, theirs = self.network.connect(worker.process, self.head.process)
        self.head.accept(theirs)
        self.note(f"{worker.process.name} connects to the router")
        return ours

    def reach(self, source: SimulatedWorker, target: TransferAddress) -> tuple[float, str]:
        other = self.workers.get((target.worker_id, target.incarnation))
        severed = self._severed(source.spec.worker_id, target.worker_id)
        if severed is not None and severed.is_silent:
            return CONNECT_TIMEOUT_S, "no answer"
        if other is None or not other.process.is_alive or severed is not None:
            return self.faults.latency_s(), "Connection refused"
        after_s = self.network.arrival_s(source.process, other.process) - self.time.now_s
        if other.process.is_frozen or after_s > CONNECT_TIMEOUT_S:
            return CONNECT_TIMEOUT_S, "no answer"
        return after_s + self.faults.latency_s(), ""

    def on_sample(self, worker: SimulatedWorker, seq: Sequence, choice: int, index: int) -> None:
        deadly = self._scenario.deadly
        if deadly is not None and (seq.transfer.request_id, index, choice) == (
            deadly.request_id,
            deadly.index,
            0,
        ):
            self._die_of(deadly, worker)
        token = seq.transfer.request_id, seq.spec.sampling.seed, choice, index
        if token in self._computed and self._scenario.is_computed_once and not self._num_displaced:
            self.violation(f"{token[0]}/{choice}: token {index} is computed a second time")
        self._computed.add(token)

    def _die_of(self, deadly: Deadly, worker: SimulatedWorker) -> None:
        """Ends a worker's process amid its step, of which nothing is reported."""
        if not worker.process.is_alive:
            return
        self._num_deadly += 1
        self.faults.count("worker died of a request")
        held = {leg.spec.transfer.request_id for leg in worker.worker.held_legs() if leg.ended is None}
        if self._num_deadly > 1 and held != {deadly.request_id}:
            self.violation(f"{worker.spec} dies of {deadly.request_id} with {sorted(held)}")
        if self._num_deadly > 2:
            self.violation(f"{self._num_deadly} workers died of {deadly.request_id}")
        worker.process.kill()

    # accidents

    def _strike_rank(self, accident: PlannedRankAccident) -> None:
        others = [rank for worker in self._alive() for rank in worker.ranks[1:]]
        name = strike(accident, others, self.faults, self.network)
        self.note(f"ACCIDENT {accident.kind.value}: {name}, {accident.duration_s} s")

    def _strike(self, accident: PlannedAccident) -> None:
        workers = self._alive()
        if not workers:
            return
        worker = workers[int(accident.draw * len(workers)) % len(workers)]
        name, seconds = worker.process.name, accident.duration_s
        self.faults.count(accident.kind.value)
        self.note(f"ACCIDENT {accident.kind.value}: {name}, {seconds} s")
        match accident.kind:
            case Accident.KILL:
                worker.process.kill()
            case Accident.FREEZE:
                worker.process.stand_still(seconds)
            case Accident.ROUTER_FREEZE:
                self.head.process.stand_still(seconds)
            case Accident.ROUTER_RESTART:
                self._kill_head(self.head, min(seconds, 2.0), amid_dispatch=accident.draw * 1000 % 1 < 0.5)
            case Accident.SLOW:
                worker.clock.factor = 20.0
                self.time.call_later(seconds, lambda: setattr(worker.clock, "factor", 1.0))
            case Accident.HANG:
                worker.hangs = True
            case Accident.CRASH:
                worker.crash()
                if self._scenario.has_crashes_alone:
                    self.time.call_later(TOLD_S, lambda: self._check_told(worker))
            case Accident.PARTITION_ROUTER:
                self.network.partition("router", name, seconds)
            case Accident.PARTITION_WORKERS:
                other = workers[int(accident.draw * 7919) % len(workers)]
                self.network.partition(other.process.name, name, seconds)
            case Accident.CUT:
                self.network.cut(worker.process)
            case Accident.CUT_TRANSFERS:
                self.network.cut(worker.process, spared=self.head.process)
            case Accident.DRAIN:
                members = self.head.fleet.status()
                num_ready = sum(member.state is MemberState.READY for member in members)
                # else no worker might be left
                if num_ready > 2 and self.head.process.is_alive and self.head.fleet.is_settled:
                    self.head.manage(Drain(worker.spec.worker_id))
            case Accident.HOST_DOWN | Accident.HOST_CUT | Accident.HOSTS_PARTED | Accident.HOST_REMOVED:
                self._strike_host(accident)
            case Accident.SCALE:
                factor = max(1, max(self._scenario.pools.values()) // MAX_SIZE)
                sizes = tuple(factor * size for size in SIZES[int(accident.draw * 7)])
                self._apply(dict(zip(self._scenario.pools, sizes, strict=True)))

    def _strike_host(self, accident: PlannedAccident) -> None:
        if not self.hosts.others:
            return
        host = self.hosts.others[int(accident.draw * 7919) % len(self.hosts.others)]
        self.note(f"it is {host.name}")
        match accident.kind:
            case Accident.HOST_DOWN:
                self.hosts.take_down(host, accident.duration_s)
            case Accident.HOST_CUT:
                host.cut_until_s = self.time.now_s + accident.duration_s
                for worker in self.hosts.on(host):
                    self.network.partition("router", worker.process.name, accident.duration_s)
            case Accident.HOSTS_PARTED:  # as by a firewall: each of them reaches the head
                others = self.hosts.hosts[: self.hosts.hosts.index(host)]
                other = others[int(accident.draw * 104729) % len(others)]
                for a in self.hosts.on(host):
                    for b in self.hosts.on(other):
                        self.network.partition(a.process.name, b.process.name, accident.duration_s)
            case Accident.HOST_REMOVED:
                host.is_listed = False
                self._apply(self._pools)
                self.time.call_later(accident.duration_s, lambda: self._add_host(host))

    def _add_host(self, host: SimulatedHost) -> None:
        if not host.is_listed:
            host.is_listed = True
            self._apply(self._pools)

    def _kill_head(self, head: SimulatedHead, seconds: float, *, amid_dispatch: bool) -> None:
        """Kills the head; there is none for `seconds`. `amid_dispatch`: it dies amid its next commands, if
        they come soon, half of which are lost."""

        def kill() -> None:
            if not head.process.is_alive:
                return
            if amid_dispatch:
                self.network.lose_last_words(head.process)
            clients = head.clients.values()
            head.process.kill()
            for client in clients:
                client.on_lost()
            self.time.call_later(seconds, self._restart_head)

        if amid_dispatch:
            head.on_dispatch = lambda: self.time.call_later(0.0, kill)
        self.time.call_later(0.2 if amid_dispatch else 0.0, kill)

    def _check_told(self, worker: SimulatedWorker) -> None:
        if worker.spec.key in self.head.connected():
            self.violation(f"the router has not heard of the crash of {worker.spec}")


def _ratio(pools: dict[Role, int]) -> Ratio:
    return Ratio(pools[Role.PREFILL], pools[Role.DECODE])
