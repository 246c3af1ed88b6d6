"""The router: (event, now_s) -> commands. Everything between a client's request and the workers' tokens is
decided here.

    Submit -> JobQueue -> Placer -> Dispatch on P and D -> tokens -> ChoiceStream -> EmitTokens .. EmitEnd
                 ^                      | LegEnded(error), WorkerLost
                 +--- unfinished choices, with the tokens their clients have

No clock, no I/O: the shell carries commands out in order and feeds events in.
"""

from ..core.errors import NoWorkerAvailable, Overloaded, TokensTooSlow
from ..core.histogram import TokenGaps
from ..core.latency import LatencyModel
from ..core.messages import LegEnded, Probe, Probed, StepReport
from ..core.request import Request
from .admission import JobQueue, retry_delay_s
from .adoption import Adoption
from .config import RouterConfig
from .dispatcher import CLOSING, Dispatcher
from .events import (
    Adopted,
    Cancel,
    Closing,
    LossCause,
    RouterCommand,
    RouterEvent,
    SendCommand,
    StreamRead,
    StreamUnread,
    Submit,
    Tick,
    Timeline,
    WorkerAway,
    WorkerDraining,
    WorkerIdle,
    WorkerLost,
    WorkerReady,
    WorkerRole,
    WorkersExpected,
)
from .health import Health
from .ledger import Ledger
from .links import Links
from .live_request import Job
from .live_requests import LiveRequests
from .pairs import Pairs
from .placement import Placer
from .planning import InstanceFacts, OpenRequest
from .prefix_index import PrefixIndex
from .registered_worker import RegisteredWorker, RoutingState
from .registry import Registry
from .reports import WorkerReports
from .reunion import Reunion
from .status import Counters, RouterStatus, snapshot
from .take_over import TakeOver

STARTING_S = 1.0  # assumed between dispatches, in retry delays for clients, while no worker is ready


class Router:
    """The router's decisions. Events are handled in order of arrival; `now_s` never decreases."""

    def __init__(
        self,
        config: RouterConfig | None = None,
        model: LatencyModel | None = None,
        *,
        first_attempt: int = 0,
        adopts: bool = False,
    ) -> None:
        """A router that `adopts` takes over workers of an earlier one: it decides nothing before `Adopted`.
        Attempts count from `first_attempt`, which is above those of every earlier router, so that no two
        dispatches ever share a transfer id."""
        config = config or RouterConfig()
        self.model = model or LatencyModel()
        self._registry = Registry()
        self._index = PrefixIndex()
        self._ledger = Ledger(self._registry)
        self._links = Links()
        self._pairs = Pairs()
        self._health = Health(self._registry)
        self._placer = Placer(self._registry, self._index, self.model, self._links, self._pairs, config)
        self._queue = JobQueue(self._may_run)
        self._requests = LiveRequests(self._queue, self._ledger, config)
        self._reports = WorkerReports(
            self._registry,
            self._ledger,
            self._requests,
            self._index,
            self.model,
            self._links,
            self._pairs,
            self._health,
            self._queue.counters,
        )
        self._dispatcher = Dispatcher(
            self._registry,
            self._ledger,
            self._links,
            self._pairs,
            self.model,
            self._placer,
            self._queue,
            self._requests,
            first_attempt,
        )
        self._adoption = Adoption() if adopts else None
        self._take_over: TakeOver | None = None  # while it is under way

    @property
    def config(self) -> RouterConfig:
        return self._requests.config

    def configure(self, config: RouterConfig) -> None:
        """Applies new limits and a new SLO to subsequent events."""
        self._requests.config = self._placer.config = config
        self._dispatcher.reconsider()

    @property
    def num_live(self) -> int:
        """The number of requests that are not over."""
        return self._requests.num_live

    @property
    def is_adopting(self) -> bool:
        """Whether it still takes over what workers hold, and decides nothing."""
        return self._adoption is not None

    @property
    def counters(self) -> Counters:
        return self._requests.counters

    def handle(self, event: RouterEvent, now_s: float) -> list[RouterCommand]:
        """Returns the commands that `event` leads to. For a Submit it raises Overloaded, DuplicateRequest,
        NoWorkerAvailable or KillsWorkers; nothing has changed then."""
        if self._adoption is None:
            commands = self._react(event, now_s)
        else:
            commands = self._adopt(self._adoption, event, now_s)
            if self._adoption is not None:
                return commands
        commands += self._requests.pass_time(now_s)
        commands += self._dispatcher.end_hopeless_waits(now_s)
        self._health.review(now_s)
        self._pairs.review(now_s)
        commands += self._dispatcher.dispatch(event, now_s)
        return commands + self._probe_links(now_s)

    def _react(self, event: RouterEvent, now_s: float) -> list[RouterCommand]:
        match event:
            case StepReport():
                return self._reports.on_report(event, now_s)
            case LegEnded():
                return self._reports.on_leg_ended(event, now_s)
            case Submit():
                return self._on_submit(event.request, now_s)
            case Cancel():
                return self._requests.cancel(event, now_s)
            case Probed():
                self._links.probed(event, now_s)
            case StreamUnread() | StreamRead():
                return self._requests.note_reading(event, now_s)
            case WorkerReady():
                return self._on_worker_ready(event, now_s)
            case WorkerLost():
                return self._on_worker_lost(event, now_s)
            case WorkerAway():
                self._on_worker_away(event)
            case WorkerDraining():
                return self._on_worker_draining(event)
            case WorkerRole():
                self._on_worker_role(event)
            case WorkersExpected():
                self._registry.num_expected = event.num_workers
                self._queue.unstrand()
            case Closing():
                self._dispatcher.is_closing = True
            case Tick() | Adopted():
                pass
        return []

    def next_tick_s(self) -> float | None:
        """Returns when the next deadline or retry is due; None when only events can change anything."""
        if self._take_over is not None:
            return 0.0  # at once, but after what else is due
        waits_since_s = self._queue.longest_awaiting_s()
        due = (
            self._requests.deadlines.next_s(),
            self._queue.next_wake_s(),
            self._requests.claims_end_s,
            self._requests.next_verdict_s(),
            self._health.next_s(),
            None if waits_since_s is None else waits_since_s + self.config.max_wait_for_worker_s,
        )
        return min((at_s for at_s in due if at_s is not None), default=None)

    def status(self, now_s: float) -> RouterStatus:
        self._ledger.note_time(now_s)
        return snapshot(
            self._registry,
            self.counters,
            num_requests=self.num_live,
            num_queued=len(self._queue),
            num_expected=self._registry.num_expected,
            problems=(*self._links.problems(self._registry), *self._health.problems()),
            now_s=now_s,
        )

    def instance_facts(self) -> tuple[InstanceFacts, ...]:
        """Returns the ready workers as a planner sees them."""
        return tuple(
            InstanceFacts(
                worker.role, worker.info.num_blocks, worker.speed.prefill_factor, worker.speed.decode_factor
            )
            for worker in self._registry
            if worker.state is RoutingState.READY
        )

    def open_requests(self, max_requests: int) -> tuple[OpenRequest, ...]:
        """Returns the requests that are being served as a planner sees them, by arrival: the first ones."""
        return self._requests.open_requests(max_requests)

    def num_running(self, client: str) -> int:
        """Returns the number of choices that workers have of the client."""
        return self._ledger.num_running[client]

    @property
    def token_gaps(self) -> TokenGaps:
        """Returns the times between tokens since the router's start."""
        return self._reports.gaps

    def timeline(self, request_id: str, now_s: float) -> Timeline | None:
        """Returns the timeline of a request that is being served; None for an unknown id."""
        return self._requests.timeline(request_id, now_s)

    def timelines(self, max_requests: int, scope: str, now_s: float) -> list[Timeline]:
        """Returns the timelines of requests that are being served, newest first, whose ids begin with
        `scope`."""
        return self._requests.timelines(max_requests, scope, now_s)

    def known_blocks(self, worker_id: str) -> set[int]:
        """Returns the keys (`prefix_index.block_keys`) of the blocks that a worker caches, as far as it has
        reported them."""
        return self._index.blocks_of(worker_id)

    def check_integrity(self) -> None:
        """Raises AssertionError when an account or a queue disagrees with the live requests."""
        self._ledger.check_integrity()
        self._requests.check_integrity()

    def _on_submit(self, request: Request, now_s: float) -> list[RouterCommand]:
        adopted = self._requests.adopted(request)
        if adopted is not None and adopted.is_held_for(request):
            return self._requests.claim(adopted, request, now_s)
        if self._dispatcher.is_closing:
            raise NoWorkerAvailable(CLOSING)
        self._requests.deaths.num_under(request, now_s)
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not (self._registry.can_hold(num_tokens) or self._registry.is_worker_expected):
            raise NoWorkerAvailable(
                f"no worker is ready that can hold the {num_tokens} tokens of the request"
            )
        try:
            self._queue.check_room(
                request.client, self.config.max_queued_requests, now_s, self._job_s(request)
            )
            if self.config.enforces_itl and (wait_s := self._placer.itl_wait_s(request)):
                raise TokensTooSlow(self.config.itl_slo_s, retry_delay_s(wait_s))
        except Overloaded:
            self.counters.rejected += 1
            raise
        return self._requests.admit(request, adopted, now_s)

    def _job_s(self, request: Request) -> float:
        """Returns the seconds between dispatches if all requests were like this one: the estimate until there
        has been a dispatch."""
        num_workers = max(self._registry.num_ready(prefills=True), self._registry.num_ready(prefills=False))
        if not num_workers:
            return STARTING_S
        return (
            self.model.prefill_s(len(request.prompt_token_ids), len(request.prompt_token_ids) ** 2)
            / num_workers
        )

    def _may_run(self, job: Job) -> bool:
        """Whether the job need not wait for others of its client: a large one that many have passed, or those
        that run, by the bound on them. One request may exceed that alone."""
        if not self._dispatcher.lets_pass(job):
            return False
        limit, num_running = self.config.max_running_per_client, self._ledger.num_running[job.client]
        return limit is None or not num_running or num_running + len(job.choices) <= limit

    def _probe_links(self, now_s: float) -> list[RouterCommand]:
        return [
            SendCommand(source.worker_id, source.incarnation, Probe(target=target.info.address))
            for source, target in self._links.probes(self._registry, now_s)
        ]

    def _on_worker_ready(self, event: WorkerReady, now_s: float) -> list[RouterCommand]:
        known = self._registry.get(event.info.worker_id)
        if known is not None and known.is_away and known.incarnation == event.info.incarnation:
            return self._on_worker_back(known, event, now_s)
        if not self._registry.is_news(event.info):
            self.counters.stale += 1
            return []
        commands = [] if known is None else self._lose(known, "replaced", LossCause.GONE, now_s)
        self._registry.add(event.info, event.num_cached_blocks)
        self._links.workers_changed()
        self._registry.num_expected = max(0, self._registry.num_expected - 1)
        self._queue.unstrand()
        return commands

    def _on_worker_away(self, event: WorkerAway) -> None:
        worker = self._registry.current(event.worker_id, event.incarnation)
        if worker is not None:
            self._registry.disconnect(worker)
            self._links.lost(worker)

    def _on_worker_back(
        self, worker: RegisteredWorker, event: WorkerReady, now_s: float
    ) -> list[RouterCommand]:
        self._registry.reconnect(worker, event.num_cached_blocks)
        self._index.remove_worker(worker.worker_id)  # what it evicted meanwhile is not known
        self._links.workers_changed()
        self._queue.unstrand()
        reunion = Reunion(self._ledger, self._requests, self._reports)
        return reunion.carry_out(worker, event.held, now_s)

    def _on_worker_lost(self, event: WorkerLost, now_s: float) -> list[RouterCommand]:
        worker = self._registry.current(event.worker_id, event.incarnation)
        if worker is None:
            return self._requests.explain_loss(event, now_s)
        if worker.state is not RoutingState.DRAINING:
            self._registry.num_expected += 1  # until the shell reports otherwise
        return self._lose(worker, event.reason, event.cause, now_s)

    def _lose(
        self, worker: RegisteredWorker, reason: str, cause: LossCause, now_s: float
    ) -> list[RouterCommand]:
        self._registry.lose(worker)
        self._links.lost(worker)
        self._pairs.lost(worker)
        self._health.lost(worker)
        self._index.remove_worker(worker.worker_id)
        return self._requests.lose_worker(worker, reason, cause, now_s)

    def _adopt(self, adoption: Adoption, event: RouterEvent, now_s: float) -> list[RouterCommand]:
        """Gathers what workers hold; when all have reported, takes it over, a slice at each tick."""
        commands: list[RouterCommand] = []
        if isinstance(event, Adopted):
            adoption.is_closed = True
            for ready in adoption.ready:
                commands += self._on_worker_ready(ready, now_s)
            self._take_over = TakeOver(
                adoption, self._registry, self._ledger, self._requests, self._reports, self._react
            )
        elif self._take_over is None or not isinstance(event, Tick):
            adoption.take(event)
            return []
        assert self._take_over is not None
        commands += self._take_over.advance(now_s)
        if self._take_over.is_complete:
            self._adoption = self._take_over = None
        return commands

    def _on_worker_draining(self, event: WorkerDraining) -> list[RouterCommand]:
        worker = self._registry.get(event.worker_id)
        if worker is None or worker.state is RoutingState.DRAINING:
            return []
        self._registry.drain(worker)
        return [] if worker.open_legs else [WorkerIdle(worker.worker_id, worker.incarnation)]

    def _on_worker_role(self, event: WorkerRole) -> None:
        worker = self._registry.get(event.worker_id)
        if worker is not None:
            self._registry.assign(worker, event.role)
            self._links.workers_changed()
            self._queue.unstrand()
