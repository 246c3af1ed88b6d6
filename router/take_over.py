"""A new router replays its predecessor's view of the requests, as far as workers remember it."""

from ..core.messages import Abort, Leg, TokenOutput
from .adoption import Adoption, HeldDispatch
from .candidates import RoutingDecision
from .dispatch import Dispatch, DispatchState, Job, LiveRequest
from .events import EmitTokens, RouterCommand, SendCommand
from .ledger import Ledger
from .live_requests import LiveRequests
from .registry import Registry
from .reports import WorkerReports
from .request_events import GivenUp


class TakeOver:
    """The take-over, carried out once, when all workers are known to the registry."""

    def __init__(
        self, registry: Registry, ledger: Ledger, requests: LiveRequests, reports: WorkerReports
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._requests = requests
        self._reports = reports

    def carry_out(self, adoption: Adoption, now_s: float) -> list[RouterCommand]:
        """Lets requests wait for their clients; useless dispatches are aborted."""
        commands: list[RouterCommand] = []
        for held in adoption.requests():
            live = self._requests.adopt(held.request, now_s)
            for dispatch in held.dispatches:
                commands += self._resume(live, dispatch, now_s)
            for dispatch in held.unusable:
                for (worker_id, incarnation), _ in dispatch.legs.values():
                    commands.append(
                        SendCommand(worker_id, incarnation, Abort(transfer=dispatch.spec.transfer))
                    )
        self._reports.gaps.before.clear()  # replayed tokens have no gaps of their own
        self._requests.claims_end_s = now_s + self._requests.config.claim_timeout_s
        return commands

    def _resume(self, live: LiveRequest, held: HeldDispatch, now_s: float) -> list[RouterCommand]:
        """Takes over one dispatch, which continues if it has something to produce that no newer one does."""
        served = {choice for dispatch in live.running() for choice in dispatch.streams}
        dispatch = self._open(live, held, now_s)
        self._recall(dispatch)
        commands: list[RouterCommand] = []
        for leg, (_, reported) in held.legs.items():
            worker = dispatch.worker_of(leg)
            assert worker is not None
            commands += self._reports.on_tokens(worker, reported.outputs, now_s)
        for _, reported in held.legs.values():
            if reported.ended is not None:
                commands += self._reports.on_leg_ended(reported.ended, now_s)
        unfinished = {choice for choice, stream in dispatch.streams.items() if stream.finish_reason is None}
        is_running = dispatch.state is DispatchState.RUNNING
        if is_running and not held.is_broken and unfinished and not unfinished & served:
            return commands
        # also one that has produced all its tokens, and waits for a receiver of its KV
        if is_running or held.is_broken:
            commands += self._requests.handle(live, GivenUp(dispatch), now_s)
        return commands

    def _open(self, live: LiveRequest, held: HeldDispatch, now_s: float) -> Dispatch:
        workers = {leg: self._registry.current(*key) for leg, (key, _) in held.legs.items()}
        decode = workers.get(Leg.DECODE)
        prefill = workers.get(Leg.PREFILL) or decode
        assert prefill is not None, "workers were registered before their legs"
        job = Job(live, held.spec.choices, held.spec.output_token_ids, now_s)
        dispatch = Dispatch(job, held.spec, prefill, decode, now_s)
        live.dispatches.append(dispatch)
        self._ledger.open(dispatch, RoutingDecision(prefill, decode, 0, 0, 0.0, 0.0))
        return dispatch

    def _recall(self, dispatch: Dispatch) -> None:
        """Replays the tokens of earlier attempts, from which this one continues."""
        for stream in dispatch.streams.values():
            for index, token_id in enumerate(dispatch.spec.output_token_ids):
                output = TokenOutput(dispatch.transfer, stream.choice, index, token_id)
                if tokens := stream.accept(output):
                    dispatch.live.kept.append(EmitTokens(dispatch.live.request_id, stream.choice, tokens))
