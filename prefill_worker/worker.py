"""The prefill role of a worker: computes a prompt, emits its first token at once and pushes the KV while
still computing.

Runs on the engine thread. Commands come from the router, ends of transfers from the transfer endpoint; its
reports go into the outbox."""

import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from ..core.failures import FailureKind
from ..core.handoff import HandOff
from ..core.messages import Leg, Prefill, TransferAddress, TransferStats
from ..core.request import TransferId
from ..engine.batch import Batch, RoleEngine, SampledToken
from ..engine.outbox import LegClock, Outbox
from ..engine.sequence import Sequence
from ..engine.token_masks import TokenMasks
from .scheduler import PrefillScheduler


class SendPort(Protocol):
    """The sending side of a transfer endpoint; every call returns at once."""

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Seq[int], num_tokens: int
    ) -> None: ...
    def extend(self, transfer: TransferId, block_ids: Seq[int]) -> None: ...
    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None: ...
    def prefill_done(self, transfer: TransferId) -> None: ...
    def commit(self, transfer: TransferId, payload: bytes) -> None: ...
    def cancel(self, transfer: TransferId) -> None: ...


@dataclass(slots=True)
class _PrefillLeg:
    """One dispatch that this worker carries out. Blocks are held until `sending` is over: the transfer reads
    them."""

    sequence: Sequence
    sending: bool
    clock: LegClock
    queued: bool = True  # it is with the scheduler
    started: bool = False  # its blocks are allocated and known to the transfer
    failure: tuple[str, FailureKind] | None = None  # the cause of an abort that was not requested


class PrefillWorker:
    """Ties scheduler, model and transfers of the prefill role together, step by step."""

    def __init__(
        self,
        engine: RoleEngine,
        port: SendPort,
        outbox: Outbox,
        masks: TokenMasks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kv = engine.kv
        self._runner = engine.runner
        self._port = port
        self._outbox = outbox
        self._masks = masks
        self._num_layers = engine.num_layers
        self._clock = clock
        self.scheduler = PrefillScheduler(engine.kv, engine.max_batch_tokens)
        self._legs: dict[TransferId, _PrefillLeg] = {}

    @property
    def num_legs(self) -> int:
        return len(self._legs)

    def prefill(self, command: Prefill) -> None:
        """Accepts one dispatch. The transfer opens at once, so that the peer is connected and ready when
        there is KV."""
        spec = command.spec
        if spec.transfer in self._legs:
            return  # a duplicate of the command
        seq = Sequence(spec, spec.choices[0], self._kv.max_model_len)
        self._legs[spec.transfer] = _PrefillLeg(seq, command.target is not None, LegClock(self._clock()))
        if command.target is not None:
            self._port.send(spec.transfer, command.target, (), seq.num_tokens)
        self.scheduler.add(seq)
        self._masks.want(seq)

    def step(self) -> bool:
        """Computes one batch, if there is work. Chunks of KV leave as soon as a layer has written them."""
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        started_s = self._clock()
        legs = [self._legs[chunk.sequence.transfer] for chunk in batch.chunks]
        for leg in legs:
            leg.clock.start(started_s)
            if leg.sending and not leg.started:
                self._start_sending(leg)
        sampled = self._runner.launch(batch, self._layer_hook(batch, legs)).collect()
        self._outbox.timings.append(batch.timing(self._clock() - started_s))
        self.scheduler.complete(batch)
        for chunk, leg, tokens in zip(batch.chunks, legs, sampled, strict=True):
            if chunk.choices:
                self._finish(leg, tokens)
        return True

    def fail(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """A dispatch cannot go on, as the mask of its first token is unavailable; an unknown dispatch is
        ignored."""
        leg = self._legs.get(transfer)
        if leg is None:
            return
        leg.failure = error, kind
        self.abort(transfer)

    def abort(self, transfer: TransferId) -> None:
        """Stops a dispatch; an unknown one is ignored. The current chunk of its transfer is still sent."""
        leg = self._legs.get(transfer)
        if leg is None:
            return
        self._unqueue(leg)
        if leg.sending:
            self._port.cancel(transfer)  # ends in send_failed, or in sent when the peer had committed already
        else:
            self._end(leg, failure=("aborted", FailureKind.CANCELLED))

    def sent(self, transfer: TransferId, stats: TransferStats) -> None:
        """The peer has all KV: the blocks may return to the cache."""
        self._end(self._legs[transfer], stats=stats)

    def send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        """The transfer has ended and no longer reads the blocks."""
        leg = self._legs[transfer]
        self._unqueue(leg)
        self._end(leg, failure=(error, kind))

    def _start_sending(self, leg: _PrefillLeg) -> None:
        seq = leg.sequence
        leg.started = True
        self._port.extend(seq.transfer, tuple(seq.block_ids))
        if seq.num_cached_tokens:
            self._port.computed(seq.transfer, 0, self._num_layers, 0, seq.num_cached_tokens)

    def _layer_hook(self, batch: Batch, legs: list[_PrefillLeg]) -> Callable[[int], None] | None:
        spans = [
            (leg.sequence.transfer, chunk.start, chunk.end)
            for chunk, leg in zip(batch.chunks, legs, strict=True)
            if leg.sending
        ]
        if not spans:
            return None

        def on_layer(layer: int) -> None:
            for transfer, start, end in spans:
                self._port.computed(transfer, layer, layer + 1, start, end)

        return on_layer

    def _finish(self, leg: _PrefillLeg, tokens: list[SampledToken]) -> None:
        """The prompt is computed: emits each choice's first token and hands over, even when no choice goes
        on: the peer's report may reach the router before ours, and must agree with it."""
        seq = leg.sequence
        leg.queued = False
        self._masks.forget([seq])
        leg.clock.computed_s = self._clock()  # the time that follows is the transfer's
        index = seq.num_output_tokens
        first_tokens = tuple(
            self._outbox.token(seq, choice, index, token, seq.finish_reason_with(token.token_id))
            for choice, token in zip(seq.spec.choices, tokens, strict=True)
        )
        if leg.sending:
            self._port.prefill_done(seq.transfer)
            self._port.commit(seq.transfer, HandOff(first_tokens).encode())
        else:
            self._end(leg)

    def _unqueue(self, leg: _PrefillLeg) -> None:
        if leg.queued:
            self.scheduler.remove(leg.sequence)
            leg.queued = False

    def _end(
        self,
        leg: _PrefillLeg,
        *,
        failure: tuple[str, FailureKind] | None = None,
        stats: TransferStats | None = None,
    ) -> None:
        seq = leg.sequence
        error, kind = leg.failure or failure or (None, None)
        del self._legs[seq.transfer]
        self._kv.release(seq)
        self._masks.forget([seq])
        self._outbox.leg_ended(
            seq.transfer,
            Leg.PREFILL,
            leg.clock,
            self._clock(),
            error=error,
            kind=kind,
            num_cached_tokens=seq.num_cached_tokens,
            stats=stats,
        )
