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
from ..router.fleet_events import Apply
from ..router.planning import Ratio
from .accidents import Accidents
from .faults import Faults
from .leftovers import leftovers
from .network import ConnectionEnd, Network
from .run_checks import RunChecks, Token
from .scenario import (
    CALM_S,
    GrayKind,
    Scenario,
    Severed,
)
from .simulated_client import CONVICTED, SimulatedClient
from .simulated_head import SimulatedHead
from .simulated_hosts import SimulatedHosts
from .simulated_link import SimulatedDial
from .simulated_planner import SimulatedPlanner
from .simulated_ranks import SimulatedRank
from .simulated_worker import InstanceSpec, SimulatedWorker
from .virtual_time import VirtualProcess, VirtualTime

PATIENCE_S = 60.0  # from the last fault to the last ending, and until everything is free
MAX_EVENTS = 5_000_000
FOLLOWED = "ratio changed by the planner"
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
        self.scenario = scenario
        self.keeps_timeline = keep_timeline
        self.heard_s = scenario.heard_s
        self.rng = Random(scenario.seed + 1)
        self.time = VirtualTime(self.rng)
        self.faults = Faults(self.rng, scenario.rates)
        self._client_counts: Counter[str] = Counter()
        self.network = Network(self.time, self.faults)
        self.hosts = SimulatedHosts(self.time, Random(scenario.seed + 2), scenario.hosts, self.violation)
        self.workers: dict[tuple[str, int], SimulatedWorker] = {}
        self.pools = scenario.pools  # the desired sizes
        self._accidents = Accidents(self)
        self._checks = RunChecks(scenario, self.violation)
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

    def _watch_shares(self) -> None:
        """Lets clients contend until their shares can be told."""
        if not self._checks.check_shares(self.clients):
            self.time.call_later(0.5, self._watch_shares)
            return
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
        self.head.start(self.pools, ())
        if self._planner is not None:
            self._planner.configure(_ratio(self.pools))
            self._planner.start()
        if self.scenario.contest:
            self.time.call_at(2.5, self._watch_shares)
        for accident in self.scenario.accidents:
            self.time.call_at(accident.at_s, partial(self._accidents.strike, accident))
        for of_a_rank in self.scenario.rank_accidents:
            self.time.call_at(of_a_rank.at_s, partial(self._accidents.strike_rank, of_a_rank))
        while self.time.step(CALM_S):
            pass
        self.faults.calm()
        if self._planner is not None:
            self._planner.stop()
            self._client_counts[FOLLOWED] += self._planner.num_followed
        for host in self.hosts.hosts:
            host.is_listed = True
        self.apply(self.scenario.pools)  # drained workers come back
        if not self._wait_for(self._are_clients_done):
            waiting = [client.request_id for client in self.clients if not client.is_ended]
            self.violation(f"still waiting {PATIENCE_S:.0f} s after the last fault: {', '.join(waiting)}")
        if not self._wait_for(lambda: not self._leftovers()):
            for leftover in self._leftovers():
                self.violation(f"left behind: {leftover}")
        self._checks.check_end(self.head, self.faults.counts, self._client_counts[CONVICTED])
        self.head.router.check_integrity()
        for worker in self.alive():
            worker.pool.check_integrity()

    def _make_head(self) -> SimulatedHead:
        scenario = self.scenario
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
        plan = self.scenario.planner
        if plan is None:
            return None
        return SimulatedPlanner(
            self.time,
            Random(f"advice of {self.scenario.seed}"),
            plan,
            lambda: self.head,
            lambda ratio: self.apply(ratio.sizes),
            self.violation,
        )

    def apply(self, pools: dict[Role, int]) -> None:
        self.pools = pools
        head = self.head
        if head.process.is_frozen:
            head.process.call_later(0.0, lambda: self.apply(self.pools))
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

    def restart_head(self) -> None:
        self._generation += 1
        self._num_displaced_before = self._num_displaced
        self.head = self._make_head()
        self.note("the router is back")
        self.head.start(self.pools, self.alive())
        if self._planner is not None:
            self._planner.configure(_ratio(self.pools))

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        limit_s = self.scenario.end_of_faults_s + PATIENCE_S
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

    def alive(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers.values() if worker.process.is_alive]

    def _leftovers(self) -> list[str]:
        left = leftovers(self.head, self.alive(), self.time.now_s)
        ended = [worker for worker in self.workers.values() if not worker.process.is_alive]
        numbers = {worker.spec: worker.transfers.siblings.num_left for worker in ended}
        return left + [f"{number} ranks of {spec}" for spec, number in numbers.items() if number]

    # workers

    def start_worker(self, spec: InstanceSpec, placement: Placement) -> SimulatedWorker:
        scenario = self.scenario
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
        self._checks.started(worker)
        self.hosts.started(worker, placement, self.head.waits_for_its_first_place)
        worker.process.when_it_dies(lambda: self._note_death(worker))
        worker.start(scenario.start_s)
        return worker

    def _note_death(self, worker: SimulatedWorker) -> None:
        self.note(f"{worker.spec} died")
        self._checks.died(worker)

    def fails_store(self, worker_id: str) -> bool:
        return self._is_gray(GrayKind.STORE, worker_id) or self.faults.fails_store()

    def corrupts_chunk(self, *ends: str) -> bool:
        """Whether a chunk between these workers is altered under way."""
        return self._is_gray(GrayKind.CORRUPT, *ends) or self.faults.corrupts_chunk()

    def _is_gray(self, kind: GrayKind, *worker_ids: str) -> bool:
        gray = self.scenario.gray
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
        severed = self.scenario.severed
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
        token = Token(seq.transfer.request_id, seq.spec.sampling.seed, choice, index)
        if self._checks.is_deadly(token) and worker.process.is_alive:
            self.faults.count("worker died of a request")
            self._checks.dies(worker)
            worker.process.kill()  # amid its step, of which nothing is reported
        self._checks.sampled(token, may_repeat=bool(self._num_displaced))


def _ratio(pools: dict[Role, int]) -> Ratio:
    return Ratio(pools[Role.PREFILL], pools[Role.DECODE])
