"""Planted bugs in transfers of KV and their links."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

from pdserve.core.request import TransferId
from pdserve.decode_worker.worker import DecodeWorker
from pdserve.engine.batch import Batch
from pdserve.kv_transfer import hub
from pdserve.kv_transfer.events import Arrived, ReceiverCommand, ReceiverEvent
from pdserve.kv_transfer.idle_links import LinkUse, unused_links
from pdserve.kv_transfer.inbound import InboundPair
from pdserve.kv_transfer.inbound_transfer import InboundTransfer
from pdserve.kv_transfer.outbound import OutboundPair
from pdserve.kv_transfer.protocol import Ack, Commit
from pdserve.kv_transfer.receiver import TransferReceiver
from pdserve.kv_transfer.sender import TransferSender
from pdserve.kv_transfer.states import LinkState
from pdserve.prefill_worker.worker import PrefillWorker
from pdserve.simulator.kv_model import ChainStore

from . import Mutation, Planted


def free_on_abort_before_the_transfer_has_drained() -> Planted:
    original = DecodeWorker.abort

    def abort(self: DecodeWorker, transfer: TransferId) -> None:
        if self.scheduler.is_receiving(transfer):
            self._kv.release(self.scheduler._receiving[transfer])
        original(self, transfer)

    return patch.object(DecodeWorker, "abort", abort)


@contextmanager
def forget_the_epoch_check() -> Iterator[None]:
    """Removes both checks: where a chunk's arrival is awaited, and in the state machine."""
    original = TransferReceiver.handle

    def on_waited(
        self: InboundPair, epoch: int, then: Callable[[], None], error: BaseException | None
    ) -> None:
        then()

    def handle(self: TransferReceiver, event: ReceiverEvent, now_s: float) -> list[ReceiverCommand]:
        if isinstance(event, Arrived) and self._epoch is not None:
            event = Arrived(self._epoch, event.seq)
        return original(self, event, now_s)

    with patch.object(InboundPair, "_on_waited", on_waited), patch.object(TransferReceiver, "handle", handle):
        yield


def forget_to_renew_a_lease() -> Planted:
    original = InboundTransfer.lease_ends_s
    return patch.object(
        InboundTransfer, "lease_ends_s", lambda self, heard_s, config: original(self, 0.0, config)
    )


def lose_a_credit() -> Planted:
    def on_ack(self: TransferSender, message: Ack) -> None:
        acked = self._in_flight.pop(message.seq, None)
        if acked is not None:
            acked.transfer.chunk_acked(acked.num_bytes)

    return patch.object(TransferSender, "_on_ack", on_ack)


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True


def believe_every_checksum() -> Planted:
    return patch.object(ChainStore, "checksum", lambda self, data: _Anything())


def announce_layers_before_they_are_computed() -> Planted:
    original = PrefillWorker._layer_hook

    def layer_hook(self: PrefillWorker, batch: Batch, legs):  # type: ignore[no-untyped-def]
        announce = original(self, batch, legs)
        if announce is None:
            return None

        def on_layer(layer: int) -> None:
            for each in range(self._num_layers) if layer == 0 else ():
                announce(each)

        return on_layer

    return patch.object(PrefillWorker, "_layer_hook", layer_hook)


def commit_a_chunk_that_never_left() -> Planted:
    original = OutboundPair._send_commit

    def send_commit(self: OutboundPair, commit: Commit) -> None:
        self._spoilt.discard(commit.transfer)
        original(self, commit)

    return patch.object(OutboundPair, "_send_commit", send_commit)


@contextmanager
def close_links_with_transfers_under_way() -> Iterator[None]:
    """Removes both checks: in the choice of links, and in the state machine."""

    def choose(
        links: Mapping[hub.Key, LinkUse], max_links: int, max_idle_s: float, now_s: float
    ) -> list[hub.Key]:
        idle = {key: LinkUse(use.used_s, is_busy=False) for key, use in links.items()}
        return unused_links(idle, max_links, max_idle_s, now_s)

    def release(self: TransferSender) -> None:
        if self._link.state is LinkState.UP:
            self._close_link("unused")

    with (
        patch.object(hub, "unused_links", choose),
        patch.object(TransferSender, "_release_link", release),
    ):
        yield


def keep_more_links_than_allowed() -> Planted:
    return patch.object(hub, "unused_links", lambda *_: [])


FIRST_FOUND: dict[Mutation, int] = {
    free_on_abort_before_the_transfer_has_drained: 55,
    forget_the_epoch_check: 989,
    forget_to_renew_a_lease: 218,
    lose_a_credit: 0,
    believe_every_checksum: 65,
    announce_layers_before_they_are_computed: 0,
    commit_a_chunk_that_never_left: 13,
    close_links_with_transfers_under_way: 49,
    keep_more_links_than_allowed: 0,
}
