"""Promises that show in what a head says and hears, checked between its decisions and its shell."""

from collections.abc import Callable, Set as AbstractSet

from ..core.failures import FailureKind
from ..core.messages import Abort, LegEnded, Prefill, Probe, Serve, StepReport, WorkerCommand
from ..core.request import Request
from ..router.core import Router
from ..router.cores import Key
from ..router.events import RouterEvent, WorkerReady
from ..router.links import NUM_FAILURES
from .broken_links import BrokenLinks
from .turns import TurnsOfOthers
from .wanted import WantedLegs

MAX_TAKEN_OVER = 1  # requests in a slice


class HeadChecks:
    """Reports each broken promise of one head to `violation`."""

    def __init__(self, router: Router, violation: Callable[[str], None], *, is_first: bool) -> None:
        """`is_first`: no head was before this one."""
        self.turns = TurnsOfOthers()
        self._router = router
        self._violation = violation
        self._is_first = is_first
        self._wanted = WantedLegs()
        self._links = BrokenLinks()

    def admitted(self, now_s: float, *, comes_back: bool) -> None:
        """Checks the queue's bound. `comes_back`: the request, or work that it displaced, was admitted
        before, and returns beside the bound."""
        num_queued, limit = self._router.status(now_s).num_queued, self._router.config.max_queued_requests
        if num_queued > limit and not comes_back:
            self._violation(f"{num_queued} requests are queued, {limit} are allowed")

    def submitted(self, request: Request) -> None:
        self.turns.submitted(request)

    def refused(self, request_id: str) -> None:
        self.turns.ended(request_id)

    def took_over(self, num_requests: int) -> None:
        """Checks that a turn of a take-over is short."""
        if num_requests > MAX_TAKEN_OVER:
            self._violation(f"{num_requests} requests are taken over in one turn")

    def sent(self, worker: Key, host: str | None, command: WorkerCommand, now_s: float) -> None:
        """Checks a command to a worker on `host`, which is unknown once its process has ended."""
        self._wanted.sent(worker, command)
        if host is not None and self._links.sent(host, command, now_s):
            self._check_want_of_another_place(command, now_s)
        if isinstance(command, Prefill | Serve):
            self.turns.dispatched(command.spec.transfer.request_id)
        if not isinstance(command, Abort | Probe):
            self._check_bound(command)

    def ended(self, request_id: str, connected: AbstractSet[Key]) -> None:
        """Checks that no worker is left working for a request that has ended."""
        self.turns.ended(request_id)
        for text in self._wanted.ended(request_id, connected):
            self._violation(text)

    def hears(self, event: RouterEvent, now_s: float) -> None:
        """Checks a worker's report before the router handles it."""
        match event:
            case WorkerReady(info, held):
                self._wanted.took_over((info.worker_id, info.incarnation), held)
                self._links.took_over(info.address.host_id, held)
            case StepReport():
                self._wanted.heard(event)
            case LegEnded():
                self._wanted.heard(event)
                self._links.heard(event, now_s)
                if event.kind is FailureKind.DISAGREEMENT:
                    self._violation(
                        f"{event.worker_id}: {event.leg.value} of {event.transfer}: {event.error}"
                    )

    def came_back(self, worker: Key) -> None:
        """Checks what a worker was answered that has reported what it holds."""
        for text in self._wanted.came_back(worker):
            self._violation(text)

    def check_links(self, serving: AbstractSet[str], now_s: float) -> None:
        """Checks that links between hosts that serve have been tried."""
        for link in self._links.untried(serving, now_s):
            self._violation(f"no worker has tried the link from {link[0]} to {link[1]}")

    def _check_want_of_another_place(self, command: WorkerCommand, now_s: float) -> None:
        """Checks that the placement of a command over a broken link considered that, and found nothing
        better."""
        assert isinstance(command, Prefill)
        transfer = command.spec.transfer
        timeline = self._router.timeline(transfer.request_id, now_s)
        for dispatch in timeline.dispatches if timeline is not None else ():
            if dispatch.number == transfer.attempt and not dispatch.considered[0].has_failed:
                self._violation(
                    f"{transfer} takes a link between hosts that has just failed {NUM_FAILURES} times"
                )

    def _check_bound(self, command: WorkerCommand) -> None:
        """Checks that a client runs no more than it may; what comes back is not held up."""
        if not isinstance(command, Prefill | Serve):
            return
        limit, spec = self._router.config.max_running_per_client, command.spec
        num_running = self._router.num_running(spec.client)
        counters = self._router.counters
        comes_back = counters.retried or counters.unread or counters.displaced or not self._is_first
        if limit is not None and not comes_back and limit < num_running > len(spec.choices):
            self._violation(f"{spec.client} runs {num_running} choices, {limit} are allowed")
