"""The decode role of a worker: reserves blocks for KV that prefill workers compute, then produces tokens
until each choice ends.

Runs on the engine thread. Also serves whole requests (both phases on one worker), which is also how a
preempted sequence resumes. Its reports go into the outbox."""

import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from ..core.failures import FailureKind
from ..core.handoff import HandOff
from ..core.messages import Leg, Reserve, Serve
from ..core.request import SequenceSpec, TransferId
from ..engine.batch import Batch, Launched, RoleEngine
from ..engine.outbox import LegClock, Outbox
from ..engine.sequence import Sequence
from ..engine.token_masks import AwaitMasks, TokenMasks
from .scheduler import DecodeScheduler, Emission


class ReceivePort(Protocol):
    """The receiving side of a transfer endpoint; every call returns at once."""

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Seq[int],
        num_tokens: int,
        num_cached_tokens: int,
        num_source_ranks: int,
    ) -> None: ...
    def cancel(self, transfer: TransferId) -> None: ...


@dataclass(slots=True)
class _DecodeLeg:
    """One dispatch that this worker carries out; `reserve` names the worker that sends its KV, None when it
    is computed here."""

    clock: LegClock
    reserve: Reserve | None
    num_cached_tokens: int = 0
    aborted: bool = False
    aborted_choices: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not yet collected."""

    batch: Batch
    step: Launched
    launched_s: float


class DecodeWorker:
    """Ties scheduler, model and reservations of the decode role together, step by step.

    Over a runner that runs ahead, a step is launched before the previous one is collected, wherever the
    scheduler allows it. Any call that may free blocks of a sequence with a step under way settles that step
    first."""

    def __init__(
        self,
        engine: RoleEngine,
        port: ReceivePort,
        outbox: Outbox,
        masks: TokenMasks,
        await_masks: AwaitMasks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._kv = engine.kv
        self._runner = engine.runner
        self._port = port
        self._outbox = outbox
        self._masks = masks
        self._await_masks = await_masks
        self.scheduler = DecodeScheduler(
            engine.kv, max_batch_size=engine.max_batch_size, max_batch_tokens=engine.max_batch_tokens
        )
        self._legs: dict[TransferId, _DecodeLeg] = {}
        self._unstarted: set[TransferId] = set()  # of these: none of their tokens has been computed here
        self._flight: _Flight | None = None
        self._collected_s = 0.0

    @property
    def num_legs(self) -> int:
        return len(self._legs)

    def reserve(self, command: Reserve) -> None:
        """Accepts a dispatch whose KV another worker computes."""
        seq = self._accept(command.spec, command)
        if seq is not None:
            self.scheduler.reserve(seq)

    def serve(self, command: Serve) -> None:
        """Accepts a dispatch to be computed from its first token on."""
        seq = self._accept(command.spec, None)
        if seq is not None:
            self.scheduler.add(seq)
            self._masks.want(seq)

    def step(self) -> bool:
        """Grants reservations and launches one batch, if there is work; collects the previous one."""
        if self._flight is not None and not self.scheduler.may_run_ahead:
            self.settle()
        plan = self.scheduler.schedule()
        if plan.batch is None:
            self._grant(plan.granted)
            return self.settle() or bool(plan.granted)
        if not plan.batch.copies:
            self._grant(plan.granted)  # at once, so that KV is sent while the step is computed
        started_s = self._clock()
        if self._unstarted:
            self._start_legs(plan.batch, started_s)
        step = self._runner.launch(plan.batch, before_sampling=self._wait_for_masks(plan.batch))
        if plan.batch.copies:
            self._grant(plan.granted)  # their blocks may have been copied from
        self.settle(ahead=plan.batch)
        self.scheduler.launched(plan.batch)
        self._flight = _Flight(plan.batch, step, started_s)
        if not (self._runner.runs_ahead and self.scheduler.may_run_ahead):
            self.settle()
        return True

    def settle(self, ahead: Batch | None = None) -> bool:
        """Collects the step that is under way, before which `ahead` was launched; returns False when there is
        none.

        A step's duration runs from its launch, or from the end of the previous one, to its own end.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        sampled = flight.step.collect()
        now_s = self._clock()
        self._outbox.timings.append(flight.batch.timing(now_s - max(flight.launched_s, self._collected_s)))
        self._collected_s = now_s
        wasted = self.scheduler.ended_in(flight.batch)
        emissions = self.scheduler.complete(flight.batch, sampled, ahead)
        self._emit(emissions)
        ended = wasted + [emission.sequence for emission in emissions if emission.reason is not None]
        for transfer in dict.fromkeys(seq.transfer for seq in ended):
            if not self.scheduler.has_sequences(transfer):
                self._end(transfer)
        return True

    def _wait_for_masks(self, batch: Batch) -> Callable[[], None] | None:
        if self._masks.is_empty:
            return None
        without = [
            chunk.sequence for chunk in batch.chunks if chunk.choices and not chunk.sequence.may_sample
        ]
        return partial(self._await_masks, without) if without else None

    def received(self, transfer: TransferId, payload: bytes) -> None:
        """The KV of a reservation is complete; `payload` is the prefill worker's hand-off."""
        leg = self._legs[transfer]
        if leg.aborted:  # the KV had arrived before the endpoint received the abort
            self.receive_failed(transfer, "aborted", FailureKind.CANCELLED)
            return
        try:
            hand_off = HandOff.decode(payload)
        except msgspec.MsgspecError as error:
            self.receive_failed(transfer, f"malformed hand-off: {error}", FailureKind.DISAGREEMENT)
            return
        self._unstarted.discard(transfer)
        leg.clock.start(self._clock())
        self._outbox.outputs += hand_off.first_tokens
        going_on = tuple(pair for pair in hand_off.going_on if pair[0] not in leg.aborted_choices)
        for seq in self.scheduler.received(transfer, going_on):
            self._masks.want(seq)
        if not going_on:
            self._end(transfer)

    def receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """The transfer has ended and writes no more."""
        self.scheduler.receive_failed(transfer)
        self._end(transfer, error=error, kind=kind)

    def fail(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """A dispatch cannot go on, as the mask of a next token is unavailable; an unknown dispatch is
        ignored."""
        if transfer in self._legs:
            self.settle()
        if transfer in self._legs:
            self.scheduler.remove(transfer)
            self._end(transfer, error=error, kind=kind)

    def abort(self, transfer: TransferId) -> None:
        """Stops a dispatch; an unknown one is ignored. Blocks that a transfer may still write are freed when
        it has ended."""
        self.settle()  # a leg that has ended may have a row in it
        leg = self._legs.get(transfer)
        if leg is None:
            return
        leg.aborted = True
        if self.scheduler.is_receiving(transfer):
            self._port.cancel(transfer)
        else:
            self.scheduler.remove(transfer)
            self._end(transfer, error="aborted", kind=FailureKind.CANCELLED)

    def abort_choice(self, transfer: TransferId, choice: int) -> None:
        """Stops one choice of a dispatch and frees its blocks, except those that a transfer is writing or its
        siblings share. One that is not here is ignored."""
        self.settle()
        leg = self._legs.get(transfer)
        if leg is None:
            return
        leg.aborted_choices.add(choice)
        seq = self.scheduler.remove_choice(transfer, choice)
        if seq is None:
            return
        self._masks.forget([seq])
        if not self.scheduler.has_sequences(transfer):
            self._end(transfer)

    def _accept(self, spec: SequenceSpec, reserve: Reserve | None) -> Sequence | None:
        """Returns a new leg's sequence; None when the command is a duplicate."""
        if spec.transfer in self._legs:
            return None
        self._legs[spec.transfer] = _DecodeLeg(LegClock(self._clock()), reserve)
        self._unstarted.add(spec.transfer)
        return Sequence(spec, spec.choices[0], self._kv.max_model_len)

    def _start_legs(self, batch: Batch, now_s: float) -> None:
        for chunk in batch.chunks:
            transfer = chunk.sequence.transfer
            if transfer in self._unstarted:
                self._unstarted.remove(transfer)
                leg = self._legs[transfer]
                leg.clock.start(now_s)
                leg.num_cached_tokens = max(leg.num_cached_tokens, chunk.sequence.num_cached_tokens)

    def _grant(self, granted: Seq[Sequence]) -> None:
        for seq in granted:
            leg = self._legs[seq.transfer]
            reserve = leg.reserve
            assert reserve is not None
            leg.num_cached_tokens = seq.num_cached_tokens
            self._port.expect(
                seq.transfer,
                (reserve.source_worker_id, reserve.source_incarnation),
                tuple(seq.block_ids),
                seq.num_tokens,
                seq.num_cached_tokens,
                reserve.num_source_ranks,
            )

    def _emit(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            seq = emission.sequence
            self._outbox.token(seq, emission.choice, emission.index, emission.token, emission.reason)
            if not seq.spec.sampling.grammar:
                continue
            if emission.reason is None:
                self._masks.want(seq)
            else:
                self._masks.forget([seq])

    def _end(
        self, transfer: TransferId, *, error: str | None = None, kind: FailureKind | None = None
    ) -> None:
        leg = self._legs.pop(transfer)
        self._unstarted.discard(transfer)
        self._masks.forget_all(transfer)
        self._outbox.leg_ended(
            transfer,
            Leg.DECODE,
            leg.clock,
            self._clock(),
            error=error,
            kind=kind,
            num_cached_tokens=leg.num_cached_tokens,
        )
