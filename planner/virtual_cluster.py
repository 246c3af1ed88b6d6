"""A cluster in virtual time, without faults: production's router, schedulers and block pools serve a
workload; steps and transfers take their predicted durations and compute nothing.

    Arrival --Submit--> Router --commands--> Worker.step() --reports--> Router
                                    P --KV, through shared ports--> D

Messages take no time. A transfer's bytes leave while the step that computes them is under way."""

from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import pairwise

from ..core.errors import PdserveError
from ..core.latency import LatencyModel
from ..core.messages import KVLayout, LegEnded, Probe, Probed, Role, StepReport, TransferStats
from ..core.request import Request, SamplingParams, TransferId
from ..loadgen.slo import Slo
from ..router.config import PREFILL_ON_DECODE_FACTOR, RouterConfig
from ..router.core import Router
from ..router.events import (
    EmitEnd,
    EmitTokens,
    RequestClosed,
    RouterEvent,
    SendCommand,
    Submit,
    Tick,
    Timeline,
    WorkerDraining,
    WorkerReady,
    WorkerRole,
)
from ..router.registered_worker import RoutingState
from .shared_links import Flow, SharedLinks
from .virtual_instance import INCARNATION, InstanceShape, VirtualInstance

MAX_QUEUED = 1 << 20  # so many that what comes too late is served too late, and not refused


def replaying(router: RouterConfig, prefills_on_decode: bool) -> RouterConfig:
    """Returns the settings of a replay's router: it refuses nothing, and all requests are of one client."""
    return replace(
        router,
        max_queued_requests=MAX_QUEUED,
        max_running_per_client=None,
        enforces_itl=False,
        prefill_on_decode_factor=PREFILL_ON_DECODE_FACTOR if prefills_on_decode else None,
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a workload. Its output has `num_output_tokens` tokens, whatever they are. One that comes
    before instant 0 has waited since."""

    at_s: float
    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """A request that has come before instant 0, and had `num_tokens` tokens by then, the first one at
    `first_token_s`. They end its `prompt_token_ids`."""

    at_s: float
    prompt_token_ids: tuple[int, ...]
    first_token_s: float
    num_tokens: int
    num_left: int  # at least 1


@dataclass(slots=True)
class ServedRequest:
    """A request with the instants of its tokens, in virtual seconds."""

    number: int  # in the order of arrival
    arrived_s: float
    num_prompt_tokens: int
    token_s: list[float] = field(default_factory=list)  # when each token came
    is_complete: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.arrived_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Returns the mean time per output token; None for a single token."""
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

    @property
    def largest_gap_s(self) -> float | None:
        """Returns the longest time between two tokens; None for a single token."""
        return max((later - earlier for earlier, later in pairwise(self.token_s)), default=None)

    @property
    def e2e_s(self) -> float | None:
        return self.token_s[-1] - self.arrived_s if self.token_s else None

    def misses(self, slo: Slo) -> list[str]:
        """Returns the objectives that it missed; "failed" alone where it has no answer."""
        if not self.is_complete:
            return ["failed"]
        return slo.missed(self.ttft_s, self.tpot_s, self.largest_gap_s, self.e2e_s)


@dataclass(slots=True)
class _Transfer:
    """One request's KV on its way from P to D."""

    source: VirtualInstance | None = None
    target: VirtualInstance | None = None  # once it has reserved blocks
    num_cached_tokens: int = 0  # of the target
    num_computed_tokens: int = 0
    num_bytes: int = 0  # that are moved, or under way
    flow: Flow | None = None  # the bytes under way
    started_s: float | None = None
    computed_s: float = 0.0  # when the prefill was done
    exposed_bytes: float = 0.0  # those that had not arrived then
    payload: bytes | None = None  # with the prefill's end


class VirtualCluster:
    """Serves one workload."""

    def __init__(self, shapes: Seq[InstanceShape], layout: KVLayout, config: RouterConfig) -> None:
        """The router knows the first instance's speed from the start, as if it had measured it."""
        self.now_s = 0.0
        self.num_bytes_moved = 0
        self.on_closed: Callable[[Timeline], object] = lambda _: None  # a request is over, at workers too
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._num_calls = 0
        self._layout = layout
        self.model = LatencyModel(shapes[0].durations.priors)
        self.router = Router(config, self.model)
        self.instances: dict[str, VirtualInstance] = {}
        self._links = SharedLinks({})
        self._transfers: dict[TransferId, _Transfer] = {}
        self._flows: dict[Flow, TransferId] = {}
        self.served: list[ServedRequest] = []  # and being served
        self._tick_s: float | None = None
        self._is_enough: Callable[[ServedRequest], bool] | None = None
        self._has_enough = False
        self.is_preloading = False  # prompts and transfers take no time
        for shape in shapes:
            self.join(shape)

    def serve(
        self,
        workload: Iterable[Arrival],
        is_enough: Callable[[ServedRequest], bool] | None = None,
        decoding: Iterable[Decoding] = (),
    ) -> list[ServedRequest]:
        """Serves all requests to their ends, those that are `decoding` at the start first. Instants of
        arrival never decrease.

        `is_enough` is asked at each request's end; once it says so, the rest is left unserved."""
        self._is_enough = is_enough
        self._preload(decoding)
        self._expect_next(iter(workload))
        while self._calls and not self._has_enough:
            self.now_s, _, call = heappop(self._calls)
            call()
        return self.served

    def stop(self) -> None:
        """Leaves the rest unserved."""
        self._has_enough = True

    def check_idle(self) -> None:
        """Raises AssertionError when anything is held, after all requests have ended."""
        self.router.check_integrity()
        assert not self.router.num_live and not self._transfers
        for instance in self.instances.values():
            instance.check_idle()

    def join(self, shape: InstanceShape) -> None:
        """Lets one more instance serve from now on."""
        name = f"{shape.role.value}-{len(self.instances)}"
        instance = self.instances[name] = VirtualInstance(self, name, shape, self._layout)
        self._links.add(name, shape.durations.link_bytes_per_s)
        self._route(WorkerReady(instance.info))

    def least_loaded(self, role: Role) -> str:
        """Returns the instance of the pool with the fewest open legs among those that do not drain."""
        workers = self.router.status(self.now_s).workers
        pool = (one for one in workers if one.role is role and one.state is RoutingState.READY)
        return min(pool, key=lambda one: (one.num_legs, one.worker_id)).worker_id

    def assign(self, name: str, role: Role) -> None:
        """Lets an instance serve as `role` from now on; its streams continue."""
        self._route(WorkerRole(name, role))

    def drain(self, name: str) -> None:
        """Gives an instance no more work; its streams continue."""
        self._route(WorkerDraining(name))

    def call_at(self, at_s: float, call: Callable[[], object]) -> None:
        self._num_calls += 1
        heappush(self._calls, (at_s, self._num_calls, call))

    # clients

    def _preload(self, decoding: Iterable[Decoding]) -> None:
        """Those for whose KV no place is left begin as soon as there is one."""
        config = self.router.config
        self.router.configure(replace(config, prefill_on_decode_factor=None))
        self.is_preloading = True
        for one in decoding:
            served = ServedRequest(len(self.served), one.at_s, len(one.prompt_token_ids))
            served.token_s += [one.first_token_s] * one.num_tokens
            self._submit(served, one.prompt_token_ids, one.num_left)
        while self._calls and self._calls[0][0] <= self.now_s:
            heappop(self._calls)[2]()
        self.is_preloading = False
        self.router.configure(config)

    def _expect_next(self, workload: Iterator[Arrival]) -> None:
        arrival = next(workload, None)
        if arrival is not None:
            self.call_at(max(arrival.at_s, self.now_s), lambda: self._arrive(arrival, workload))

    def _arrive(self, arrival: Arrival, workload: Iterator[Arrival]) -> None:
        self._expect_next(workload)
        served = ServedRequest(len(self.served), arrival.at_s, len(arrival.prompt_token_ids))
        self._submit(served, arrival.prompt_token_ids, arrival.num_output_tokens)

    def _submit(
        self, served: ServedRequest, prompt_token_ids: tuple[int, ...], num_output_tokens: int
    ) -> None:
        self.served.append(served)
        request = Request(
            request_id=str(served.number),
            prompt_token_ids=prompt_token_ids,
            sampling=SamplingParams(max_tokens=num_output_tokens, ignore_eos=True),
        )
        try:
            self._route(Submit(request))
        except PdserveError as error:
            self._end(served, str(error))

    # the router

    def report(self, message: StepReport | LegEnded) -> None:
        self._route(message)

    def _route(self, event: RouterEvent) -> None:
        for command in self.router.handle(event, self.now_s):
            match command:
                case EmitTokens():
                    served = self.served[int(command.request_id)]
                    served.token_s += [self.now_s] * len(command.tokens)
                case SendCommand(command=Probe()):
                    self.call_at(self.now_s, lambda command=command: self._answer(command))  # type: ignore[misc]
                case SendCommand():
                    self.instances[command.worker_id].command(command.command)
                case EmitEnd():
                    self._end(self.served[int(command.request_id)], command.error)
                case RequestClosed():
                    self.on_closed(command.timeline)
        self._tick_later()

    def _end(self, served: ServedRequest, error: str | None) -> None:
        served.is_complete, served.error = error is None, error
        if self._is_enough is not None and self._is_enough(served):
            self._has_enough = True

    def _tick_later(self) -> None:
        due_s = self.router.next_tick_s()
        if due_s is not None and (self._tick_s is None or due_s < self._tick_s):
            self._tick_s = due_s
            self.call_at(max(due_s, self.now_s), self._tick)

    def _tick(self) -> None:
        self._tick_s = None
        self._route(Tick())

    def _answer(self, command: SendCommand) -> None:
        """Every instance reaches every other one."""
        assert isinstance(command.command, Probe)
        self._route(
            Probed(
                worker_id=command.worker_id,
                incarnation=command.incarnation,
                target_worker_id=command.command.target.worker_id,
                target_incarnation=INCARNATION,
                error="",
            )
        )

    # transfers

    def opened(self, transfer: TransferId, source: VirtualInstance) -> None:
        self._transfer(transfer).source = source

    def granted(self, transfer: TransferId, target: VirtualInstance, num_cached_tokens: int) -> None:
        one = self._transfer(transfer)
        one.target, one.num_cached_tokens = target, num_cached_tokens
        self._move(transfer, one)
        self._end_if_complete(transfer, one)

    def computed(self, transfer: TransferId, num_tokens: int) -> None:
        one = self._transfer(transfer)
        one.num_computed_tokens = num_tokens
        self._move(transfer, one)

    def committed(self, transfer: TransferId, payload: bytes) -> None:
        one = self._transfer(transfer)
        one.payload, one.computed_s = payload, self.now_s
        if one.flow is not None:
            one.exposed_bytes = one.flow.left_bytes(self.now_s)
        elif one.target is None:
            one.exposed_bytes = one.num_computed_tokens * self._layout.wire_bytes_per_token
        self._end_if_complete(transfer, one)

    def _transfer(self, transfer: TransferId) -> _Transfer:
        return self._transfers.setdefault(transfer, _Transfer())

    def _move(self, transfer: TransferId, one: _Transfer) -> None:
        """Lets what is computed, and what the target lacks, leave."""
        if one.target is None or one.source is None:
            return
        num_tokens = max(0, one.num_computed_tokens - one.num_cached_tokens)
        more_bytes = num_tokens * self._layout.wire_bytes_per_token - one.num_bytes
        if more_bytes <= 0:
            return
        if one.started_s is None:
            one.started_s = self.now_s
        one.num_bytes += more_bytes
        self.num_bytes_moved += more_bytes
        if self.is_preloading:
            return
        if one.flow is None:
            one.flow = Flow(one.source.name, one.target.name, more_bytes)
            self._flows[one.flow] = transfer
            self._foresee(self._links.start(one.flow, self.now_s))
        else:
            self._foresee(self._links.extend(one.flow, more_bytes, self.now_s))

    def _foresee(self, flows: Iterable[Flow]) -> None:
        for flow in flows:
            self.call_at(
                flow.end_s,
                lambda flow=flow, version=flow.version: self._end_flow(flow, version),  # type: ignore[misc]
            )

    def _end_flow(self, flow: Flow, version: int) -> None:
        if flow.version != version:
            return
        transfer = self._flows.pop(flow)
        self._foresee(self._links.end(flow, self.now_s))
        one = self._transfers[transfer]
        one.flow = None
        self._end_if_complete(transfer, one)

    def _end_if_complete(self, transfer: TransferId, one: _Transfer) -> None:
        if one.payload is not None and one.target is not None and one.flow is None:
            assert one.source is not None
            transfer_s = 0.0 if self.is_preloading else one.source.shape.durations.transfer_s
            self.call_at(self.now_s + transfer_s, lambda: self._end_transfer(transfer, one))

    def _end_transfer(self, transfer: TransferId, one: _Transfer) -> None:
        assert one.source is not None and one.target is not None and one.payload is not None
        del self._transfers[transfer]
        one.target.received(transfer, one.payload)
        stats = TransferStats(
            num_bytes=one.num_bytes,
            num_chunks=1,
            duration_s=0.0 if one.started_s is None else self.now_s - one.started_s,
            exposed_s=self.now_s - one.computed_s,
            hidden_bytes=max(0, one.num_bytes - int(one.exposed_bytes)),
        )
        one.source.sent(transfer, stats)
