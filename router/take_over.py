"""A new router replays its predecessor's view of the requests, as far as workers remember it.

It does so in slices, each of one turn of the router's loop: heartbeats must go on, or the workers would take
this router for dead as well."""

from array import array
from collections.abc import Callable, Iterator

from ..core.messages import Abort, HeldLeg, Leg
from .adoption import Adoption, HeldDispatch
from .candidates import RoutingDecision
from .events import RouterCommand, RouterEvent, SendCommand
from .kept_stream import KeptTokens
from .ledger import Ledger
from .live_request import Dispatch, DispatchState, Job, LiveRequest
from .live_requests import LiveRequests
from .registry import Registry
from .reports import WorkerReports
from .request_events import GivenUp

LEG_TOKENS = 64  # as many as a leg costs, beside those of its tokens that do not come packed
WORKER_TOKENS = 256  # likewise a worker whose legs are gathered
EVENT_TOKENS = 256  # likewise an event that has waited for the take-over


class TakeOver:
    """The take-over, when all workers are known to the registry, up to the last event that has waited for
    it."""

    def __init__(
        self,
        adoption: Adoption,
        registry: Registry,
        ledger: Ledger,
        requests: LiveRequests,
        reports: WorkerReports,
        react: Callable[[RouterEvent, float], list[RouterCommand]],
    ) -> None:
        """`react` handles the events that have waited."""
        self.is_complete = False
        self._registry = registry
        self._ledger = ledger
        self._requests = requests
        self._reports = reports
        self._react = react
        self._now_s = 0.0
        self._commands: list[RouterCommand] = []
        self._work = self._carry_out(adoption)

    def advance(self, now_s: float) -> list[RouterCommand]:
        """Carries out the next slice: lets requests wait for their clients, and aborts useless dispatches."""
        self._now_s = now_s
        num_left = self._requests.config.take_over_tokens
        for num_tokens in self._work:
            num_left -= num_tokens
            if num_left <= 0:
                break
        else:
            self.is_complete = True
        commands, self._commands = self._commands, []
        return commands

    def _carry_out(self, adoption: Adoption) -> Iterator[int]:
        """Yields the cost of each piece of work that is done."""
        for held in adoption.requests():
            if held is None:
                yield WORKER_TOKENS
                continue
            live = self._requests.adopt(held.spec, self._now_s)
            for dispatch in held.dispatches:
                yield from self._resume(live, dispatch)
            for dispatch in held.unusable:
                for (worker_id, incarnation), _ in dispatch.legs.values():
                    self._commands.append(
                        SendCommand(worker_id, incarnation, Abort(transfer=dispatch.spec.transfer))
                    )
                yield LEG_TOKENS
        self._requests.claims_end_s = self._now_s + self._requests.config.claim_timeout_s
        while adoption.later:
            self._commands += self._react(adoption.later.popleft(), self._now_s)
            yield EVENT_TOKENS

    def _resume(self, live: LiveRequest, held: HeldDispatch) -> Iterator[int]:
        """Takes over one dispatch, which continues if it has something to produce that no newer one does."""
        served = {choice for dispatch in live.running() for choice in dispatch.streams}
        dispatch = self._open(live, held)
        self._recall(dispatch)
        yield LEG_TOKENS
        for leg, (_, reported) in held.legs.items():
            yield from self._replay(dispatch, leg, reported)
        for _, reported in held.legs.values():
            if reported.ended is not None:
                self._commands += self._reports.on_leg_ended(reported.ended, self._now_s)
        unfinished = {choice for choice, stream in dispatch.streams.items() if stream.finish_reason is None}
        is_running = dispatch.state is DispatchState.RUNNING
        if is_running and not held.is_broken and unfinished and not unfinished & served:
            return
        # also one that has produced all its tokens, and waits for a receiver of its KV
        if is_running or held.is_broken:
            self._commands += self._requests.handle(live, GivenUp(dispatch), self._now_s)

    def _replay(self, dispatch: Dispatch, leg: Leg, reported: HeldLeg) -> Iterator[int]:
        worker = dispatch.worker_of(leg)
        assert worker is not None
        step = self._requests.config.take_over_tokens
        is_done = self._reports.replay_plain(dispatch, worker, reported, self._now_s)
        remaining = reported.later_outputs if is_done else reported.outputs()
        for first in range(0, len(remaining), step):
            outputs = remaining[first : first + step]
            self._commands += self._reports.replay(dispatch, worker, outputs, self._now_s)
            yield len(outputs)

    def _open(self, live: LiveRequest, held: HeldDispatch) -> Dispatch:
        workers = {leg: self._registry.current(*key) for leg, (key, _) in held.legs.items()}
        decode = workers.get(Leg.DECODE)
        prefill = workers.get(Leg.PREFILL) or decode
        assert prefill is not None, "workers were registered before their legs"
        job = Job(live, held.spec.choices, held.spec.output_token_ids, self._now_s)
        dispatch = Dispatch(job, held.spec, prefill, decode, self._now_s)
        live.dispatches.append(dispatch)
        self._ledger.open(dispatch, RoutingDecision(prefill, decode, 0, 0, 0.0, 0.0))
        return dispatch

    def _recall(self, dispatch: Dispatch) -> None:
        """Replays the tokens of earlier attempts, from which this one continues."""
        token_ids = array("I", dispatch.spec.output_token_ids)
        live = dispatch.live
        for choice, stream in dispatch.streams.items() if token_ids else ():
            first_index, due = len(stream.token_ids), stream.accept_plain(0, token_ids)
            if due is None:
                recalled = KeptTokens(dispatch.transfer, choice, 0, token_ids).emitted()
                live.kept.add_outputs(choice, stream.accept_run(recalled.tokens))
            else:
                live.kept.add_tokens(dispatch.transfer, choice, first_index, due)
