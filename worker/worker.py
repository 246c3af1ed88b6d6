"""Both roles over one engine, between an inbox and an outbox: a worker's behaviour, without threads, sockets
or processes.

    command, or a transfer's ending -> role -> step(): prefill, then decode -> take_messages()

The shell around it (`worker.process`, and the simulator's) owns the loop and calls from one thread.
"""

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..core.failures import FailureKind
from ..core.messages import (
    Abort,
    Heartbeat,
    HeldLeg,
    Leg,
    LegEnded,
    Prefill,
    Probe,
    Reserve,
    Serve,
    StepReport,
    StepTiming,
    TransferStats,
    WorkerCommand,
    WorkerLoad,
)
from ..core.request import TransferId
from ..decode_worker.worker import DecodeWorker, ReceivePort
from ..engine.batch import RoleEngine
from ..engine.outbox import Outbox
from ..engine.token_masks import AwaitMasks, MaskPort, TokenMasks
from ..prefill_worker.worker import PrefillWorker, SendPort
from .held_legs import HeldLegs


class TransferPort(SendPort, ReceivePort, Protocol):
    """Both sides of a transfer endpoint."""


class Worker:
    """Owned by the engine thread."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        engine: RoleEngine,
        port: TransferPort,
        mask_port: MaskPort,
        await_masks: AwaitMasks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker_id, self._incarnation = worker_id, incarnation
        self._pool = engine.kv.pool
        self._outbox = Outbox(worker_id, incarnation)
        self._masks = TokenMasks(mask_port)
        self._prefill = PrefillWorker(engine, port, self._outbox, self._masks, clock)
        self._decode = DecodeWorker(engine, port, self._outbox, self._masks, await_masks, clock)
        self._held = HeldLegs(clock)
        self.load = self._measure_load()

    @property
    def num_legs(self) -> int:
        return self._prefill.num_legs + self._decode.num_legs

    def handle(self, command: WorkerCommand) -> None:
        """Accepts or stops a dispatch. One that is here already, or is not known, is left unchanged."""
        match command:
            case Prefill():
                self._held.accepted(command.spec, Leg.PREFILL, has_partner=command.target is not None)
                self._prefill.prefill(command)
            case Reserve():
                self._held.accepted(command.spec, Leg.DECODE, has_partner=True)
                self._decode.reserve(command)
            case Serve():
                self._held.accepted(command.spec, Leg.DECODE, has_partner=False)
                self._decode.serve(command)
            case Abort(transfer=transfer, choice=None):
                self._prefill.abort(transfer)
                self._decode.abort(transfer)
            case Abort(transfer=transfer, choice=choice):
                assert choice is not None
                self._decode.abort_choice(transfer, choice)
            case Heartbeat() | Probe():
                pass

    # ends of transfers, see `kv_transfer.TransferListener`

    def received(self, transfer: TransferId, payload: bytes) -> None:
        self._decode.received(transfer, payload)

    def receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._decode.receive_failed(transfer, error, kind)

    def sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._prefill.sent(transfer, stats)

    def send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._prefill.send_failed(transfer, error, kind)

    # answers of the grammar process, see `grammar.GrammarListener`

    def masked(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._masks.masked(key, num_tokens, bits)

    def mask_failed(self, key: int, error: str, kind: FailureKind) -> None:
        transfer = self._masks.given_up(key)
        if transfer is not None:
            self._prefill.fail(transfer, error, kind)
            self._decode.fail(transfer, error, kind)

    def step(self) -> bool:
        """Runs one batch of each role that has work; returns False when there was none."""
        if self._prefill.scheduler.has_sequences:  # a step under way must not count towards a prompt's time
            self._decode.settle()
        worked = self._prefill.step()
        return self._decode.step() or worked

    def take_messages(self) -> list[StepReport | LegEnded]:
        """Returns the output of the last events and steps: tokens first, then the legs that ended. Always
        contains at least one report."""
        outputs, ended, timings = self._outbox.take()
        self._held.record(outputs, ended)
        added, evicted = self._pool.take_events()
        self.load = self._measure_load()
        reports = [self.report(timing) for timing in timings] or [self.report()]
        reports[0] = msgspec.structs.replace(
            reports[0], outputs=outputs, blocks_added=tuple(added), blocks_evicted=tuple(evicted)
        )
        return [*reports, *ended]

    def held_legs(self) -> tuple[HeldLeg, ...]:
        """Returns the legs that a newly connected router has to know, up to the last `take_messages`."""
        return self._held.all()

    def greeted(self) -> None:
        """A router that knows nothing of this worker has been greeted: what is cached follows in reports."""
        self._pool.report_anew()

    @property
    def num_cached_blocks(self) -> int:
        return self._pool.num_cached_blocks

    @property
    def has_more_to_report(self) -> bool:
        """Whether another `take_messages` would report more, without another step."""
        return self._pool.num_unreported_blocks > 0

    def report(self, timing: StepTiming | None = None) -> StepReport:
        """Returns the load after the last step; may be called from any thread."""
        return StepReport(
            worker_id=self._worker_id, incarnation=self._incarnation, load=self.load, timing=timing
        )

    def _measure_load(self) -> WorkerLoad:
        prefill, decode = self._prefill.scheduler, self._decode.scheduler
        return WorkerLoad(
            num_running=prefill.num_running + decode.num_running,
            num_waiting=prefill.num_waiting + decode.num_waiting,
            num_queued_tokens=prefill.num_queued_tokens + decode.num_queued_tokens,
            num_context_tokens=decode.num_context_tokens,
            num_free_blocks=self._pool.num_free_blocks,
            num_preemptions=decode.num_preemptions,
            num_unreported_blocks=self._pool.num_unreported_blocks,
        )
