"""Planted bugs in a worker: its schedulers, its blocks, its link to the router."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from pdserve.core.messages import HeldLeg, WorkerInfo
from pdserve.core.request import TransferId
from pdserve.decode_worker.scheduler import DecodeScheduler, Emission
from pdserve.decode_worker.worker import DecodeWorker
from pdserve.engine import sequence
from pdserve.engine.batch import Batch
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.kv_manager import KVManager
from pdserve.engine.sequence import Sequence
from pdserve.worker import ending
from pdserve.worker.held_legs import HeldLegs
from pdserve.worker.router_session import RouterSession
from pdserve.worker.step_watch import StepWatch

from . import Mutation, Planted


def leak_on_cancel() -> Planted:
    original = DecodeScheduler.remove

    def remove(self: DecodeScheduler, transfer: TransferId) -> None:
        with patch.object(KVManager, "release", lambda self, seq: None):
            original(self, transfer)

    return patch.object(DecodeScheduler, "remove", remove)


def free_twice_on_preemption() -> Planted:
    original = KVManager.reset

    def reset(self: KVManager, seq: Sequence) -> None:
        self.pool.free(seq.block_ids[-1:])
        original(self, seq)

    return patch.object(KVManager, "reset", reset)


def share_kv_between_salts() -> Planted:
    original = sequence.block_hashes  # type: ignore[attr-defined]
    return patch.object(
        sequence, "block_hashes", lambda tokens, size, salt, parent: original(tokens, size, "", parent)
    )


def decode_an_aborted_sequence() -> Planted:
    original = DecodeWorker.received

    def received(self: DecodeWorker, transfer: TransferId, payload: bytes) -> None:
        self._legs[transfer].aborted = False
        original(self, transfer, payload)

    return patch.object(DecodeWorker, "received", received)


def compute_only_part_of_a_prompt_with_requested_logprobs() -> Planted:
    original = KVManager.admit
    return patch.object(KVManager, "admit", lambda self, seq, use_cache=True: original(self, seq))


def release_an_ended_sequence_while_a_step_has_a_row_of_it() -> Planted:
    original = DecodeScheduler.complete

    def complete(self: DecodeScheduler, *step):  # type: ignore[no-untyped-def]
        emissions = original(self, *step)
        for seq in self._ended_ahead:
            self._kv.release(seq)
        return emissions

    return patch.object(DecodeScheduler, "complete", complete)


def report_the_token_of_a_wasted_row() -> Planted:
    original = DecodeScheduler.complete

    def complete(self: DecodeScheduler, batch: Batch, sampled, *rest):  # type: ignore[no-untyped-def]
        wasted = [
            Emission(chunk.sequence, chunk.sequence.choice, chunk.sequence.num_output_tokens, tokens[0], None)
            for chunk, tokens in zip(batch.chunks, sampled, strict=True)
            if chunk.sequence in self._ended_ahead
        ]
        return wasted + original(self, batch, sampled, *rest)

    return patch.object(DecodeScheduler, "complete", complete)


def run_ahead_of_a_token_that_decides() -> Planted:
    return patch.object(DecodeScheduler, "may_run_ahead", True)


def compute_an_aborted_choice() -> Planted:
    return patch.object(DecodeScheduler, "remove_choice", lambda self, transfer, choice: None)


def forget_tokens_computed_before_the_router_died() -> Planted:
    return patch.object(HeldLegs, "all", lambda self: ())


def greet_only_the_first_router() -> Planted:
    original = RouterSession.greeting

    def greeting(
        self: RouterSession, connection: object, info: WorkerInfo, held: Iterable[HeldLeg], num_cached: int
    ) -> list[Any]:
        return original(self, connection, info, held, num_cached) if self._greeted is None else []

    return patch.object(RouterSession, "greeting", greeting)


def report_what_is_cached_to_the_first_router_alone() -> Planted:
    return patch.object(BlockPool, "report_anew", lambda self: None)


def believe_that_every_step_ends() -> Planted:
    return patch.object(StepWatch, "beat", lambda self: None)


def end_workers_with_the_router() -> Planted:
    def lost(self: RouterSession, now_s: float) -> None:
        self._served_s = float("-inf")

    return patch.object(RouterSession, "lost", lost)


def end_a_load_that_takes_long() -> Planted:
    original = RouterSession.progress
    return patch.object(RouterSession, "progress", lambda self, phase, fraction: original(self, phase, 0.0))


@contextmanager
def tell_of_a_crash_when_all_is_closed() -> Iterator[None]:
    with (
        patch.object(ending, "CLOSING_ORDER", ending.CLOSING_ORDER[::-1]),
        patch.object(RouterSession, "failing", lambda self, reason: None),
    ):
        yield


FIRST_FOUND: dict[Mutation, int] = {
    leak_on_cancel: 0,
    free_twice_on_preemption: 1,
    share_kv_between_salts: 1,
    decode_an_aborted_sequence: 121,
    compute_only_part_of_a_prompt_with_requested_logprobs: 1,
    release_an_ended_sequence_while_a_step_has_a_row_of_it: 0,
    report_the_token_of_a_wasted_row: 0,
    run_ahead_of_a_token_that_decides: 0,
    compute_an_aborted_choice: 9,
    forget_tokens_computed_before_the_router_died: 78,
    greet_only_the_first_router: 82,
    report_what_is_cached_to_the_first_router_alone: 9,
    believe_that_every_step_ends: 40,
    end_workers_with_the_router: 82,
    end_a_load_that_takes_long: 48,
    tell_of_a_crash_when_all_is_closed: 5,
}
