"""A new router lives through what the router before has seen of its requests, as far as workers remember it."""

from ..core.messages import Abort, Leg, TokenOutput
from .adoption import Adoption, HeldDispatch
from .candidates import Placement
from .dispatch import Dispatch, DispatchState, Job, LiveRequest
from .events import EmitTokens, RouterCommand, SendCommand
from .ledger import Ledger
from .live_requests import LiveRequests
from .registry import Registry
from .reports import WorkerReports


class TakeOver:
    """Once, when all workers are known to the registry."""

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        requests: LiveRequests,
        reports: WorkerReports,
        out: list[RouterCommand],
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._requests = requests
        self._reports = reports
        self._out = out

    def carry_out(self, adoption: Adoption, now_s: float) -> None:
        """Requests wait for their clients from now on; dispatches of no use are aborted."""
        for held in adoption.requests():
            live = self._requests.adopt(held.request, now_s)
            served: set[int] = set()
            for dispatch in held.dispatches:
                served |= self._resume(live, dispatch, served, now_s)
            for stranger in held.strangers:
                for (worker_id, incarnation), _ in stranger.legs.values():
                    self._out.append(SendCommand(worker_id, incarnation, Abort(transfer=stranger.spec.transfer)))
        self._reports.gaps.before.clear()  # tokens that are told again have no gaps of their own
        self._requests.claims_end_s = now_s + self._requests.config.claim_timeout_s

    def _resume(self, live: LiveRequest, held: HeldDispatch, served: set[int], now_s: float) -> set[int]:
        """Take over one dispatch; returns the choices that it goes on to produce, which are none of `served`."""
        dispatch = self._open(live, held, now_s)
        self._recall(dispatch)
        for leg, (_, told) in held.legs.items():
            worker = dispatch.worker_of(leg)
            assert worker is not None
            for output in told.outputs:
                self._reports.on_token(worker, output, now_s)
        for _, told in held.legs.values():
            if told.ended is not None:
                self._reports.on_leg_ended(told.ended, now_s)
        unfinished = {choice for choice, stream in dispatch.streams.items() if stream.finish_reason is None}
        is_running = dispatch.state is DispatchState.RUNNING
        if is_running and not held.is_broken and unfinished and not unfinished & served:
            return unfinished
        if is_running or held.is_broken:  # also one that has brought all its tokens, and waits for a taker of its KV
            self._requests.give_up(dispatch, now_s)
        return set()

    def _open(self, live: LiveRequest, held: HeldDispatch, now_s: float) -> Dispatch:
        workers = {leg: self._registry.current(*key) for leg, (key, _) in held.legs.items()}
        decode = workers.get(Leg.DECODE)
        prefill = workers.get(Leg.PREFILL) or decode
        assert prefill is not None, "workers were made known before their legs"
        job = Job(live, held.spec.choices, held.spec.output_token_ids, now_s)
        dispatch = Dispatch(job, held.spec, prefill, decode, now_s)
        live.dispatches.append(dispatch)
        self._ledger.open(dispatch, Placement(prefill, decode, 0, 0, 0.0, 0.0))
        return dispatch

    def _recall(self, dispatch: Dispatch) -> None:
        """The tokens of earlier attempts, which this one was given to go on from."""
        for stream in dispatch.streams.values():
            for index, token_id in enumerate(dispatch.spec.output_token_ids):
                output = TokenOutput(dispatch.transfer, stream.choice, index, token_id)
                if tokens := stream.accept(output):
                    self._requests.emit(dispatch.live, EmitTokens(dispatch.live.request_id, stream.choice, tokens))
