"""Two endpoints in one process: transfers that are aborted, refused or cut off end without affecting others,
and report why."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from pdserve.core.request import TransferId

from .leftovers import TRANSPORTS, T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .support import CALM, Worker, layout, pair


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_an_aborted_transfer_never_writes_into_reused_blocks(transport: str, side: str) -> None:
    with pair(transport=transport) as (sender, receiver):
        cancelling = sender if side == "sender" else receiver
        receiver.store.on_scatter = lambda: cancelling.endpoint.cancel(T)
        receiver.expect(T, sender.key, list(range(32)), 256)
        sender.endpoint.send(T, receiver.address, list(range(32)), 256)
        sender.endpoint.computed(T, 0, 3, 0, 200)
        assert "cancelled" in receiver.ends.receive_error(T)
        assert "cancelled" in sender.ends.send_error(T)
        receiver.store.on_scatter = lambda: None
        reused = TransferId("other", 0)
        receiver.store.writable = {3}
        receiver.expect(reused, sender.key, [3], 8)
        sender.push(reused, receiver.address, [60], 8)
        receiver.ends.received(reused)
        np.testing.assert_array_equal(receiver.store.read([3], 0, 8), sender.store.read([60], 0, 8))
        assert receiver.endpoint.counters.num_links_opened == 1, "a cancel keeps the link"


def test_a_cancel_before_the_offer_is_reported_to_the_sender() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        receiver.endpoint.cancel(T)
        receiver.ends.receive_error(T)
        sender.push(T, receiver.address, [1], 8)
        assert sender.ends.send_error(T) == "cancelled by the receiver"


def test_cancelling_an_unknown_or_ended_transfer_does_nothing() -> None:
    with pair() as (sender, receiver):
        sender.endpoint.cancel(TransferId("nobody", 3))
        receiver.expect(T, sender.key, [1], 8)
        sender.push(T, receiver.address, [1], 8)
        receiver.ends.received(T)
        sender.ends.sent(T)
        sender.endpoint.cancel(T)
        receiver.endpoint.cancel(T)
        second = TransferId("request", 1)
        receiver.expect(second, sender.key, [2], 8)
        sender.push(second, receiver.address, [2], 8)
        receiver.ends.received(second)
        receiver.ends.received(T)
        sender.ends.sent(T)


def test_an_unmatched_reservation_or_offer_ends_with_the_lease() -> None:
    with pair(config=replace(CALM, lease_s=0.2, max_lease_s=0.5)) as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        assert "lease" in receiver.ends.receive_error(T)
        other = TransferId("other", 0)
        sender.push(other, receiver.address, [1], 8)
        assert "without a reservation" in sender.ends.send_error(other)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_differing_layouts_are_refused_by_field_name(transport: str) -> None:
    with pair(layout(num_kv_heads=2), layout(num_kv_heads=4), transport) as (sender, receiver):
        sender.push(T, receiver.address, [1], 8)
        assert "num_kv_heads: 4 here, 2 there" in sender.ends.send_error(T)


def test_a_wrong_token_is_refused() -> None:
    sender, receiver = Worker("p", layout(), token="guess"), Worker("d", layout())
    try:
        sender.push(T, receiver.address, [1], 8)
        assert "does not know this cluster's token" in sender.ends.send_error(T)
    finally:
        sender.endpoint.close()
        receiver.endpoint.close()


def test_a_replaced_worker_is_not_mistaken_for_its_successor() -> None:
    sender, receiver = Worker("p", layout()), Worker("d", layout(), incarnation=2)
    try:
        old = msgspec.structs.replace(receiver.address, incarnation=1)
        sender.push(T, old, [1], 8)
        assert "this is d (incarnation 2), not d (incarnation 1)" in sender.ends.send_error(T)
    finally:
        sender.endpoint.close()
        receiver.endpoint.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_closed_peer_fails_its_transfers_and_a_new_one_is_served(transport: str) -> None:
    with pair(transport=transport) as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        sender.endpoint.send(T, receiver.address, [1], 8)
        warm = TransferId("warm", 0)
        receiver.expect(warm, sender.key, [2], 8)
        sender.push(warm, receiver.address, [2], 8)
        receiver.ends.received(warm)
        receiver.endpoint.close()
        assert receiver.ends.receive_error(T) == "the endpoint was closed"
        assert sender.ends.send_error(T)
        successor = Worker("d", layout(), transport=transport, incarnation=2)
        try:
            again = TransferId("request", 1)
            successor.expect(again, sender.key, [1], 8)
            sender.push(again, successor.address, [1], 8)
            successor.ends.received(again)
        finally:
            successor.endpoint.close()


def test_a_store_failure_ends_only_its_transfer() -> None:
    with pair() as (sender, receiver):
        other = TransferId("request", 1)
        receiver.expect(other, sender.key, [2], 8)
        sender.endpoint.send(other, receiver.address, [2], 8)
        sender.store.gather_error = OSError("device lost")
        receiver.expect(T, sender.key, [1], 8)
        sender.push(T, receiver.address, [1], 8)  # chunks and COMMIT are decided at once
        assert "device lost" in sender.ends.send_error(T)
        assert "device lost" in receiver.ends.receive_error(T)
        sender.store.gather_error = None
        sender.endpoint.computed(other, 0, 3, 0, 8)
        sender.endpoint.commit(other, b"done")
        assert receiver.ends.received(other) == b"done"
        assert receiver.endpoint.counters.num_nacks == 0


def test_a_commit_before_everything_was_computed_fails_by_name() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        sender.endpoint.send(T, receiver.address, [1], 8)
        sender.endpoint.computed(T, 0, 3, 0, 5)
        sender.endpoint.commit(T, b"")
        assert "9 (layer, token) cells not computed" in sender.ends.send_error(T)
        assert "not computed" in receiver.ends.receive_error(T)
