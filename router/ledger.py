"""The ledger of open work: every dispatch with an open leg, and its account at its workers. Only this file
writes accounts."""

from collections import Counter
from collections.abc import Iterator

from ..core.messages import Leg, LegEnded, StepReport
from ..core.request import TransferId
from .candidates import RoutingDecision
from .decode_legs import DecodeLegs
from .live_request import Dispatch
from .ranking import Ranking
from .registered_worker import RegisteredWorker
from .registry import Registry


class Ledger:
    """Books dispatches on their workers when they start and off when their legs close: all accounts are zero
    when idle."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._dispatches: dict[TransferId, Dispatch] = {}
        # by client: choices of dispatches with an open leg that have not ended; absent means 0
        self.num_running: Counter[str] = Counter()
        self._by_running: Ranking[str] = Ranking()  # those clients, the one that runs least first
        self.decoding = DecodeLegs()
        self.num_blocks: Counter[str] = Counter()  # by client: reserved by its open decode legs

    def by_running(self) -> Iterator[str]:
        """Yields the clients that run something, the one that runs most first."""
        return reversed(self._by_running)

    def __iter__(self) -> Iterator[Dispatch]:
        return iter(self._dispatches.values())

    def __len__(self) -> int:
        return len(self._dispatches)

    def get(self, transfer: TransferId) -> Dispatch | None:
        return self._dispatches.get(transfer)

    def at(self, worker: RegisteredWorker) -> list[Dispatch]:
        """Returns the dispatches with an open leg at the worker, oldest first."""
        return [self._dispatches[transfer] for transfer in worker.open_legs]

    def open(self, dispatch: Dispatch, placement: RoutingDecision) -> None:
        """Books a dispatch on its workers."""
        dispatch.num_new_tokens = placement.num_new_tokens
        dispatch.prefill_s = placement.prefill_s
        dispatch.placement = placement
        self._dispatches[dispatch.transfer] = dispatch
        self._count_running(dispatch.spec.client, len(dispatch.spec.choices))
        dispatch.live.num_open_legs += len(dispatch.open_legs)
        dispatch.prefill.start_prefill(dispatch.num_new_tokens, dispatch.prefill_s)
        dispatch.prefill.open_legs[dispatch.transfer] = None
        if dispatch.is_pair:
            dispatch.prefill.num_sending += 1
        if dispatch.decode is not None:
            self._open_decode(dispatch, dispatch.decode)
        self._registry.rank(dispatch.prefill)

    def _open_decode(self, dispatch: Dispatch, worker: RegisteredWorker) -> None:
        spec = dispatch.spec
        dispatch.num_reserved_blocks = worker.blocks_for(spec.num_tokens, len(spec.choices))
        self.num_blocks[spec.client] += dispatch.num_reserved_blocks
        self.decoding.add(dispatch)
        worker.open_legs[dispatch.transfer] = None
        worker.num_sequences += len(spec.choices)
        worker.num_context_tokens += len(spec.choices) * spec.num_tokens
        worker.num_reserved_blocks += dispatch.num_reserved_blocks
        dispatch.num_expected_tokens = len(spec.choices) * dispatch.job.num_expected_tokens
        worker.num_expected_tokens += dispatch.num_expected_tokens
        worker.num_pending_blocks += dispatch.num_reserved_blocks
        self._registry.rank(worker)

    def note_report(self, worker: RegisteredWorker, report: StepReport, now_s: float) -> None:
        """Records a worker's load and the progress of its step."""
        is_more = report.load.num_free_blocks > worker.load.num_free_blocks
        if report.load.num_preemptions > worker.load.num_preemptions:
            worker.widen_growth()
        worker.load = report.load
        self._registry.note_room(worker, is_more=is_more)
        worker.note_step(report.timing is not None, now_s)
        if report.timing is None and not report.load.num_running:
            worker.speed.forget(max(0.0, now_s - worker.reported_s))
            self._registry.rank(worker)
        worker.reported_s = now_s
        if report.timing is not None and report.timing.num_prefill_tokens:
            worker.progress(report.timing.duration_s)
        worker.count_tokens(len(report.outputs), now_s)

    def note_time(self, now_s: float) -> None:
        """Updates every worker's token rate: one that has not reported has produced nothing."""
        for worker in self._registry:
            worker.count_tokens(0, now_s)

    def note_ending(self, dispatch: Dispatch, ended: LegEnded) -> None:
        """Records a worker's own account of its leg, for the timeline and the worker's hit rate."""
        if ended.leg is Leg.PREFILL:
            dispatch.prefill_ended = ended
        else:
            dispatch.decode_ended = ended
        if ended.error is None and ended.leg is dispatch.leg_at(dispatch.prefill):
            dispatch.prefill.num_prompt_tokens += dispatch.spec.num_tokens
            dispatch.prefill.num_cached_tokens += ended.num_cached_tokens

    def count_token(self, dispatch: Dispatch, worker: RegisteredWorker, num_tokens: int = 1) -> None:
        """Counts a token, or several, of a running dispatch from one of its workers."""
        if dispatch.is_prefilling:
            self._end_prefill(dispatch)
        if worker is dispatch.decode:
            if not dispatch.decode_started:
                dispatch.decode_started = True
                worker.num_pending_blocks -= dispatch.num_reserved_blocks
                if worker.role.prefills:
                    self._registry.rank(worker)
                else:
                    self._registry.note_room(worker)
            dispatch.num_grown_tokens += num_tokens
            worker.num_grown_tokens += num_tokens
            worker.num_context_tokens += num_tokens
            if dispatch.num_expected_tokens:
                self._expect(dispatch, max(0, dispatch.num_expected_tokens - num_tokens))

    def _expect(self, dispatch: Dispatch, num_tokens: int) -> None:
        """The dispatch is expected to bring `num_tokens` from now on."""
        assert dispatch.decode is not None
        dispatch.decode.num_expected_tokens += num_tokens - dispatch.num_expected_tokens
        dispatch.num_expected_tokens = num_tokens

    def _end_prefill(self, dispatch: Dispatch) -> None:
        dispatch.is_prefilling = False
        dispatch.prefill.end_prefill(dispatch.num_new_tokens, dispatch.prefill_s)
        self._registry.rank(dispatch.prefill)

    def end_choice(self, dispatch: Dispatch) -> None:
        """Takes a choice that has ended off the accounts: its worker has freed its place, or is about to."""
        if not dispatch.open_legs:
            return
        dispatch.num_booked -= 1
        self._count_running(dispatch.spec.client, -1)
        if dispatch.decode is not None and Leg.DECODE in dispatch.open_legs:
            dispatch.decode.num_sequences -= 1
            num_left = dispatch.num_expected_tokens * dispatch.num_booked // (dispatch.num_booked + 1)
            self._expect(dispatch, num_left)
            self._registry.rank(dispatch.decode)

    def close(self, dispatch: Dispatch, leg: Leg) -> RegisteredWorker:
        """Takes a leg for which the worker holds nothing any more off its account."""
        worker = dispatch.worker_of(leg)
        assert worker is not None and leg in dispatch.open_legs, f"{dispatch.transfer} has no open {leg} leg"
        dispatch.open_legs.remove(leg)
        dispatch.live.num_open_legs -= 1
        del worker.open_legs[dispatch.transfer]
        if dispatch.is_prefilling and worker is dispatch.prefill:
            self._end_prefill(dispatch)
        if leg is Leg.DECODE:
            self._close_decode(dispatch, worker)
        elif dispatch.is_pair:
            worker.num_sending -= 1
            self._registry.rank(worker)
        if not dispatch.open_legs:
            del self._dispatches[dispatch.transfer]
            self._count_running(dispatch.spec.client, -dispatch.num_booked)
        return worker

    def _count_running(self, client: str, num_choices: int) -> None:
        self.num_running[client] += num_choices
        if self.num_running[client]:
            self._by_running.put(client, self.num_running[client], client)
        else:
            del self.num_running[client]
            self._by_running.discard(client)

    def fail(self, dispatch: Dispatch, failure: str, now_s: float) -> None:
        """Marks a dispatch as failed; its open legs close later."""
        dispatch.fail(failure, now_s)
        if Leg.DECODE in dispatch.open_legs:
            self.decoding.fail(dispatch)

    def _close_decode(self, dispatch: Dispatch, worker: RegisteredWorker) -> None:
        spec = dispatch.spec
        self.decoding.remove(dispatch)
        self.num_blocks[spec.client] -= dispatch.num_reserved_blocks
        if not self.num_blocks[spec.client]:
            del self.num_blocks[spec.client]
        if not dispatch.decode_started:
            worker.num_pending_blocks -= dispatch.num_reserved_blocks
        worker.num_sequences -= dispatch.num_booked
        worker.num_context_tokens -= len(spec.choices) * spec.num_tokens + dispatch.num_grown_tokens
        worker.num_reserved_blocks -= dispatch.num_reserved_blocks
        worker.num_grown_tokens -= dispatch.num_grown_tokens
        self._expect(dispatch, 0)
        worker.relax_growth()
        self._registry.rank(worker)

    def check_integrity(self) -> None:
        """Checks that every account equals the sum over the open legs. For tests, and for status when
        idle."""
        num_running: Counter[str] = Counter()
        num_blocks: Counter[str] = Counter()
        for dispatch in self:
            num_running[dispatch.spec.client] += dispatch.num_booked
            if Leg.DECODE in dispatch.open_legs:
                num_blocks[dispatch.spec.client] += dispatch.num_reserved_blocks
        self.decoding.check_integrity({d for d in self if Leg.DECODE in d.open_legs})
        running = {client: self.num_running[client] for client in self.by_running()}
        assert running == self.num_running, f"{running} are ranked, {self.num_running} run"
        assert num_blocks == self.num_blocks, f"{self.num_blocks}, the open legs say {num_blocks}"
        assert +num_running == self.num_running, f"{self.num_running}, the open dispatches say {num_running}"
        for worker in self._registry:
            here = [d for d in self.at(worker) if d.decode is worker and Leg.DECODE in d.open_legs]
            prefilling = [d for d in self._dispatches.values() if d.prefill is worker and d.is_prefilling]
            sending = [d for d in self.at(worker) if d.prefill is worker and Leg.PREFILL in d.open_legs]
            expected = {
                "num_sending": sum(d.is_pair for d in sending),
                "num_prefilling": len(prefilling),
                "num_queued_tokens": sum(d.num_new_tokens for d in prefilling),
                "num_short_tokens": sum(
                    d.num_new_tokens for d in prefilling if worker.is_short(d.num_new_tokens)
                ),
                "num_sequences": sum(d.num_booked for d in here),
                "num_context_tokens": sum(
                    len(d.spec.choices) * d.spec.num_tokens + d.num_grown_tokens for d in here
                ),
                "num_reserved_blocks": sum(d.num_reserved_blocks for d in here),
                "num_grown_tokens": sum(d.num_grown_tokens for d in here),
                "num_expected_tokens": sum(d.num_expected_tokens for d in here),
                "num_pending_blocks": sum(d.num_reserved_blocks for d in here if not d.decode_started),
            }
            actual = {name: getattr(worker, name) for name in expected}
            assert actual == expected, f"{worker.worker_id}: {actual}, its open legs say {expected}"
            assert worker.num_prefilling or worker.queued_prefill_s == 0.0, (
                f"{worker.worker_id}: queue without prefills"
            )
