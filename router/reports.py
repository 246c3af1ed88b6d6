"""Handles workers' reports on their legs: tokens go to their streams, loads and times to the accounts,
endings close legs."""

from collections.abc import Sequence

from ..core.failures import FailureKind
from ..core.histogram import TokenGaps
from ..core.latency import LatencyModel
from ..core.messages import HeldLeg, Leg, LegEnded, StepReport, TokenOutput
from .events import EmitTokens, RouterCommand
from .fair_queue import OUTPUT_TOKEN, TokenCounters
from .health import Health
from .ledger import Ledger
from .links import Links
from .live_request import Dispatch, DispatchState
from .live_requests import LiveRequests
from .pairs import Pairs
from .prefix_index import PrefixIndex
from .registered_worker import RegisteredWorker
from .registry import Registry
from .request_events import LastToken, Survived
from .request_states import RequestState
from .stream import ChoiceStream

RECENTRE_STEPS = 32  # at least, from one centring of the latency model to the next


class WorkerReports:
    """Drops reports from lost incarnations and those that belong to no open leg."""

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        requests: LiveRequests,
        index: PrefixIndex,
        model: LatencyModel,
        links: Links,
        pairs: Pairs,
        health: Health,
        turns: TokenCounters,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._requests = requests
        self._index = index
        self._model = model
        self._links = links
        self._pairs = pairs
        self._health = health
        self._turns = turns
        self._num_steps_left = RECENTRE_STEPS  # until the model is centred
        self.gaps = TokenGaps()
        self._tokens_before = self.gaps.before  # saves one look-up per token

    def on_report(self, report: StepReport, now_s: float) -> list[RouterCommand]:
        worker = self._registry.current(report.worker_id, report.incarnation)
        if worker is None:
            self._requests.counters.stale += 1
            return []
        self._ledger.note_report(worker, report, now_s)
        if report.timing is not None:
            self._model.observe_step(report.timing, worker.speed)
            self._recentre()
        commands = self.on_tokens(worker, report.outputs, now_s)
        self._requests.counters.tokens += self.gaps.close(now_s)
        if report.blocks_added or report.blocks_evicted:
            self._index.update(worker.worker_id, report.blocks_added, report.blocks_evicted)
        return commands

    def _recentre(self) -> None:
        """Keeps the model at the speed of an ordinary worker, every so many steps that its cost does not grow
        with the fleet."""
        self._num_steps_left -= 1
        if self._num_steps_left <= 0:
            workers = list(self._registry)
            self._num_steps_left = max(RECENTRE_STEPS, len(workers))
            if self._model.recentre([worker.speed for worker in workers]):
                for worker in workers:
                    self._registry.rank(worker)

    def on_tokens(
        self, worker: RegisteredWorker, outputs: Sequence[TokenOutput], now_s: float
    ) -> list[RouterCommand]:
        """Handles tokens of running dispatches: each goes to its stream, and those that are due go to the
        client."""
        commands: list[RouterCommand] = []
        dispatch_of, open_legs, count_token = self._ledger.get, worker.open_legs, self._ledger.count_token
        for output in outputs:
            dispatch = dispatch_of(output.transfer)
            if dispatch is None or dispatch.state is not DispatchState.RUNNING:
                continue
            stream = dispatch.streams.get(output.choice)
            if stream is None or output.transfer not in open_legs:
                continue
            if worker is dispatch.decode and not dispatch.decode_started:
                self._health.worked(worker, dispatch.dispatched_s)
            count_token(dispatch, worker)
            tokens = stream.accept(output)
            if not tokens:
                continue
            live = dispatch.live
            request = live.request
            self._turns.charge(request.client, len(tokens) * OUTPUT_TOKEN / request.weight)
            if dispatch.first_token_s is None:
                self._note_first_token(dispatch, now_s)
            self._tokens_before.append(stream.last_token_s)
            if len(tokens) > 1:
                self._tokens_before.extend([now_s] * (len(tokens) - 1))
            stream.last_token_s = now_s
            if live.state is RequestState.UNCLAIMED:
                live.kept.add_outputs(output.choice, tokens)
            else:
                commands.append(EmitTokens(live.request_id, output.choice, tokens))
            if stream.finish_reason is not None:
                commands += self._requests.handle(live, LastToken(dispatch, stream), now_s)
            if dispatch.is_alone and dispatch.state is DispatchState.RUNNING and dispatch.has_survived:
                commands += self._requests.handle(live, Survived(dispatch, self._moves_on(worker)), now_s)
        return commands

    def replay(
        self, dispatch: Dispatch, worker: RegisteredWorker, outputs: Sequence[TokenOutput], now_s: float
    ) -> list[RouterCommand]:
        """Handles tokens that were reported to an earlier router: those of each choice at once, as nobody has
        waited for one of them."""
        of_choices: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            of_choices.setdefault(output.choice, []).append(output)
        commands: list[RouterCommand] = []
        live = dispatch.live
        for choice, of_choice in of_choices.items():
            stream = dispatch.streams.get(choice)
            if stream is None or dispatch.state is not DispatchState.RUNNING:
                continue
            self._ledger.count_token(dispatch, worker, len(of_choice))
            tokens = stream.accept_run(of_choice)
            if not tokens:
                continue
            self._note_replayed(dispatch, stream, now_s)
            live.kept.add_outputs(choice, tokens)
            if stream.finish_reason is not None:
                commands += self._requests.handle(live, LastToken(dispatch, stream), now_s)
        return commands

    def replay_plain(self, dispatch: Dispatch, worker: RegisteredWorker, held: HeldLeg, now_s: float) -> bool:
        """Does the same for the first tokens of a leg, at once. False: nothing was done, as other tokens are
        held or missing."""
        stream, token_ids = dispatch.streams.get(held.choice), held.token_ids
        if not token_ids or stream is None or dispatch.state is not DispatchState.RUNNING:
            return True
        tokens = stream.accept_plain(held.first_index, token_ids)
        if tokens is None:
            return False
        self._ledger.count_token(dispatch, worker, len(token_ids))
        if tokens:
            self._note_replayed(dispatch, stream, now_s)
            first_index = len(stream.token_ids) - len(tokens)
            dispatch.live.kept.add_tokens(held.spec.transfer, held.choice, first_index, tokens)
        return True

    def _note_replayed(self, dispatch: Dispatch, stream: ChoiceStream, now_s: float) -> None:
        if dispatch.first_token_s is None:
            self._note_first_token(dispatch, now_s)
        stream.last_token_s = now_s

    def _moves_on(self, worker: RegisteredWorker) -> bool:
        """Whether a suspect that has run alone at the worker decodes elsewhere: another one waits for the
        worker, or others decode."""
        return self._requests.has_suspects or (
            not worker.role.decodes and self._registry.num_ready(prefills=False) > 0
        )

    def _note_first_token(self, dispatch: Dispatch, now_s: float) -> None:
        dispatch.first_token_s = now_s
        live = dispatch.live
        if live.first_token_s is None:
            live.first_token_s = now_s
            self._requests.counters.prompt_tokens += live.num_prompt_tokens

    def on_leg_ended(self, event: LegEnded, now_s: float) -> list[RouterCommand]:
        worker = self._registry.current(event.worker_id, event.incarnation)
        if worker is None:
            self._requests.counters.stale += 1
            return []
        dispatch = self._ledger.get(event.transfer)
        if dispatch is None or event.transfer not in worker.open_legs:
            return []
        if event.stats is not None:
            self._model.observe_transfer(event.stats)
        self._note_health(dispatch, worker, event, now_s)
        if event.leg is Leg.PREFILL and dispatch.decode is not None and not dispatch.is_served_by_one:
            if event.stats is not None:
                self._links.worked(dispatch.prefill, dispatch.decode)
                self._pairs.worked(dispatch.prefill, dispatch.decode)
            elif event.error is not None and not event.is_invalid and dispatch.state is DispatchState.RUNNING:
                self._links.failed(dispatch.prefill, dispatch.decode, event.error, now_s)
        self._ledger.note_ending(dispatch, event)
        leg = dispatch.leg_at(worker)
        if event.leg is not leg and event.error is None:
            return []  # the prefill of a worker that serves both phases: its leg continues
        error = None if event.error is None else f"{worker.worker_id}: {event.error}"
        return self._requests.end_leg(dispatch, leg, error, event.kind, now_s)

    def _note_health(
        self, dispatch: Dispatch, worker: RegisteredWorker, event: LegEnded, now_s: float
    ) -> None:
        """A failed transfer may be either end's fault; both are innocent as soon as they work with others."""
        if event.error is None:
            self._health.worked(worker, dispatch.dispatched_s)
        elif dispatch.needs(event.leg) and event.kind not in (FailureKind.INVALID, FailureKind.CANCELLED):
            is_transfer = event.kind in (FailureKind.LOST, FailureKind.CORRUPT)
            prefill, decode = dispatch.prefill, dispatch.decode
            # until it decodes, it may be the first to report that the other end has failed
            is_transfer = is_transfer or (event.leg is Leg.DECODE and not dispatch.decode_started)
            if is_transfer and decode is not None and not dispatch.is_served_by_one:
                self._health.failed(prefill, event.error, dispatch.dispatched_s, now_s, decode)
                self._health.failed(decode, event.error, dispatch.dispatched_s, now_s, prefill)
                self._pairs.failed(prefill, decode, dispatch.dispatched_s, now_s)
            else:
                self._health.failed(worker, event.error, dispatch.dispatched_s, now_s)
