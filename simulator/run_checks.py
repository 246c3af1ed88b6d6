"""Promises over a whole simulation: of tokens, processes, shares and turns."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..router.reservation import MAX_OWN_TURNS
from .faults import ORDERLY
from .scenario import CONTEST_TOKENS, MAX_GRAY_FAILURES, Scenario
from .simulated_client import SimulatedClient
from .simulated_head import SimulatedHead
from .simulated_worker import SimulatedWorker

MAX_UNFAIRNESS = 0.1  # of a client's share
MAX_REFUSALS = 5  # of one pair, before it is avoided, and when it is tried again
MAX_TURNS = 40  # of others, while a request is the first of its client: a large one waits for 5 s


class Token(NamedTuple):
    """A token's place in its request, which decides it."""

    request_id: str
    seed: int
    choice: int
    token_index: int


class RunChecks:
    """Counts what happens in one simulation, and reports each broken promise to `violation`."""

    def __init__(self, scenario: Scenario, violation: Callable[[str], None]) -> None:
        self._scenario = scenario
        self._violation = violation
        self._computed: set[Token] = set()
        self._num_started: Counter[str] = Counter()  # processes, by worker
        self._num_died = 0  # processes that did not end in order
        self._num_deadly = 0  # of those, of the deadly request

    def started(self, worker: SimulatedWorker) -> None:
        self._num_started[worker.spec.worker_id] += 1

    def died(self, worker: SimulatedWorker) -> None:
        self._num_died += not worker.has_ended_in_order

    def sampled(self, token: Token, *, may_repeat: bool) -> None:
        """Checks that nothing is computed twice where nothing has to be."""
        if token in self._computed and self._scenario.is_computed_once and not may_repeat:
            self._violation(
                f"{token.request_id}/{token.choice}: token {token.token_index} is computed a second time"
            )
        self._computed.add(token)

    def is_deadly(self, token: Token) -> bool:
        """Whether a worker dies of computing the token."""
        deadly = self._scenario.deadly
        return deadly is not None and (token.request_id, token.token_index, token.choice) == (
            deadly.request_id,
            deadly.index,
            0,
        )

    def dies(self, worker: SimulatedWorker) -> None:
        """Checks that two workers at most die of the deadly request, the second with nothing else."""
        assert self._scenario.deadly is not None
        self._num_deadly += 1
        request_id = self._scenario.deadly.request_id
        held = {leg.spec.transfer.request_id for leg in worker.worker.held_legs() if leg.ended is None}
        if self._num_deadly > 1 and held != {request_id}:
            self._violation(f"{worker.spec} dies of {request_id} with {sorted(held)}")
        if self._num_deadly > 2:
            self._violation(f"{self._num_deadly} workers died of {request_id}")

    def check_shares(self, clients: Iterable[SimulatedClient]) -> bool:
        """Checks that clients have had tokens by their weights, once they have had enough of them, while each
        of them has a request that has not begun. Returns whether they have."""
        contest = self._scenario.contest
        had = dict.fromkeys(contest, 0.0)
        waits = set()
        for client in clients:
            if client.num_tokens:
                had[client.client] += client.service
            else:
                waits.add(client.client)
        share = sum(had.values()) / len(had)
        if share < CONTEST_TOKENS and waits == set(contest):
            return False
        if any(abs(tokens - share) > MAX_UNFAIRNESS * share for tokens in had.values()):
            self._violation(f"clients that always had something queued have had {had}")
        return True

    def check_end(self, head: SimulatedHead, faults: Counter[str], num_convicted: int) -> None:
        """Checks the counts at the end. `faults`: how often each kind occurred; `num_convicted`: endings that
        name a request as the cause of workers' deaths."""
        scenario, counters = self._scenario, head.router.counters
        orderly = {accident.value for accident in ORDERLY}
        if counters.retried and faults.keys() <= orderly and not scenario.has_large_bodies:
            self._violation(f"{counters.retried} dispatches failed without a fault")
        if scenario.is_computed_once or scenario.has_large_bodies:
            for worker_id, num_started in self._num_started.items():
                if num_started > 1:
                    self._violation(f"{worker_id} was started again, though only the router failed")
        self._check_gray(head)
        for request_id in (plan.request.request_id for plan in scenario.requests if plan.is_counted):
            if (num_turns := head.checks.turns.of(request_id)) > MAX_TURNS:
                self._violation(f"{request_id} had to wait for {num_turns} turns of others")
            if (num_passed := head.checks.turns.num_passed(request_id)) > MAX_OWN_TURNS:
                self._violation(f"{request_id} was passed by {num_passed} requests of its own client")
        if scenario.keeps_streams and counters.failed:
            self._violation(f"{counters.failed} streams were given up, which went on after each failure")
        # each takes a death of its own, after another one
        if num_convicted and num_convicted >= self._num_died:
            self._violation(f"{num_convicted} requests are to blame for {self._num_died} deaths")
        if scenario.deadly and not num_convicted:
            self._violation("the deadly request is not to blame")
        for member in head.fleet.status():
            if member.num_restarts > self._num_started[member.worker_id]:
                self._violation(
                    f"{member.worker_id} counts {member.num_restarts} restarts, more than its processes"
                )

    def _check_gray(self, head: SimulatedHead) -> None:
        """Checks that a gray worker, or a pair that cannot connect, costs few dispatches and no stream."""
        gray, severed, counters = self._scenario.gray, self._scenario.severed, head.router.counters
        max_retried = MAX_GRAY_FAILURES
        if gray is not None and gray.rate < 1.0:
            max_retried = len(self._scenario.requests)
        if severed is not None and not severed.is_silent:
            max_retried = MAX_REFUSALS
        if (gray or severed) and (counters.failed or counters.retried > max_retried):
            self._violation(
                f"{gray or severed} cost {counters.retried} dispatches and {counters.failed} streams"
            )
