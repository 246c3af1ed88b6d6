"""The path from a simulated worker's engine to its transfer hub: two threads in production, two instants
here."""

from collections.abc import Callable, Sequence as Seq
from functools import partial
from random import Random

from ..core.failures import FailureKind
from ..core.messages import TransferAddress
from ..core.request import TransferId
from ..kv_transfer.events import (
    CancelTransfer,
    CommitReady,
    Expect,
    Extend,
    OpenTransfer,
    PartComputed,
    PrefillDone,
)
from ..kv_transfer.hub import TransferHub
from ..kv_transfer.span import Span
from .kv_model import ChainStore
from .virtual_time import VirtualProcess

HOP_S = 0.00005  # between a worker's two threads


class Port:
    """Implements `worker.TransferPort`: the engine's calls reach the hub a moment later, in order."""

    def __init__(
        self,
        process: VirtualProcess,
        clock: Callable[[], float],
        hub: TransferHub,
        store: ChainStore,
        rng: Random,
    ) -> None:
        self._process, self._clock, self._hub, self._store, self._rng = process, clock, hub, store, rng
        self._last_s = 0.0

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Seq[int],
        num_tokens: int,
        num_cached_tokens: int,
        num_source_ranks: int,
    ) -> None:
        first = num_cached_tokens // self._store.layout.block_size
        self._store.leases[transfer] = frozenset(block_ids[first:])
        event = Expect(transfer, tuple(block_ids), num_tokens, num_cached_tokens)
        self._post(partial(self._hub.expect, source, event, num_source_ranks))

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Seq[int], num_tokens: int
    ) -> None:
        self._post(partial(self._hub.send, target, OpenTransfer(transfer, tuple(block_ids), num_tokens)))

    def extend(self, transfer: TransferId, block_ids: Seq[int]) -> None:
        self._post(partial(self._hub.feed_sender, transfer, Extend(transfer, tuple(block_ids))))

    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None:
        span = Span(layer_start, layer_end, token_start, token_end)
        self._post(partial(self._hub.feed_sender, transfer, PartComputed(transfer, span)))

    def prefill_done(self, transfer: TransferId) -> None:
        self._post(partial(self._hub.feed_sender, transfer, PrefillDone(transfer)))

    def commit(self, transfer: TransferId, payload: bytes) -> None:
        self._post(partial(self._hub.feed_sender, transfer, CommitReady(transfer, payload)))

    def cancel(
        self, transfer: TransferId, error: str = "cancelled", kind: FailureKind = FailureKind.CANCELLED
    ) -> None:
        self._post(partial(self._hub.cancel, CancelTransfer(transfer, error, kind)))

    def _post(self, call: Callable[[], None]) -> None:
        self._last_s = max(self._last_s + 1e-9, self._clock() + HOP_S * self._rng.random())
        self._process.call_at(self._last_s, call)
