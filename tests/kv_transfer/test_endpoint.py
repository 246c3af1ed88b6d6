"""Two endpoints in one process, over real links: content, concurrency, endings, and nothing left behind."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pdserve.core.request import TransferId
from pdserve.kv_transfer import TransferConfig

from .support import FAST, WAIT_S, Worker, layout, pair

TRANSPORTS = ("shm", "gloo")
T = TransferId("request", 0)


def open_things() -> tuple[int, int, int]:
    """File descriptors, threads and staging rings of this process."""
    gc.collect()
    rings = Path("/proc/self/maps").read_text().count("pdserve-kv")
    threads = [t for t in threading.enumerate() if t.name.startswith(("pdserve", "asyncio"))]
    return len(os.listdir("/proc/self/fd")), len(threads), rings


@pytest.fixture(scope="module", autouse=True)
def _gloo_is_warm() -> None:
    """Torch takes longer to import than a pair may take to connect, and opens two descriptors for good."""
    import torch.distributed  # noqa: F401

    with pair(transport="gloo") as (sender, receiver):
        receiver.expect(T, sender.key, [0], 1)
        sender.push(T, receiver.address, [0], 1)
        receiver.ends.received(T)


@pytest.fixture(autouse=True)
def _nothing_is_left(_gloo_is_warm: None) -> Iterator[None]:
    before = open_things()
    yield
    assert open_things() == before, "descriptors, threads or rings were left behind"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_sizes", [(8, 8), (4, 16), (16, 8)])
def test_kv_arrives_as_it_was_whatever_the_block_sizes(transport: str, dtype: str, block_sizes: tuple[int, int]) -> None:
    with pair(layout(block_sizes[0], dtype), layout(block_sizes[1], dtype), transport) as (sender, receiver):
        theirs, ours = list(range(20, 0, -1)), [7, 3, 11, 30, 2, 9, 40, 41, 5]
        receiver.expect(T, sender.key, ours, 61)
        sender.push(T, receiver.address, theirs, 61, b"first token")
        assert receiver.ends.received(T) == b"first token"
        stats = sender.ends.sent(T)
        assert stats.num_bytes == 61 * sender.store.layout.bytes_per_token
        np.testing.assert_array_equal(receiver.store.read(ours, 0, 61), sender.store.read(theirs, 0, 61))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cached_prefix_is_neither_sent_nor_written(transport: str) -> None:
    with pair(transport=transport) as (sender, receiver):
        receiver.store.cache[:] = 7
        receiver.expect(T, sender.key, [4, 2, 6], 20, cached=11)
        sender.push(T, receiver.address, [1, 2, 3], 20)
        receiver.ends.received(T)
        assert sender.ends.sent(T).num_bytes == 9 * sender.store.layout.bytes_per_token
        assert (receiver.store.read([4, 2, 6], 0, 11) == 7).all()
        assert (receiver.store.read([4, 2, 6], 20, 24) == 7).all()
        np.testing.assert_array_equal(receiver.store.read([4, 2, 6], 11, 20), sender.store.read([1, 2, 3], 11, 20))


def test_a_wholly_cached_prompt_sends_nothing_and_is_received() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8, cached=8)
        sender.push(T, receiver.address, [1], 8, b"x")
        assert receiver.ends.received(T) == b"x"
        assert sender.ends.sent(T).num_chunks == 0


def test_an_offer_may_come_before_its_reservation() -> None:
    with pair() as (sender, receiver):
        sender.push(T, receiver.address, [1, 2], 16)
        other = TransferId("other", 0)
        receiver.expect(other, sender.key, [9], 8)
        sender.push(other, receiver.address, [3], 8)
        receiver.ends.received(other)  # the offer of T was there before
        receiver.expect(T, sender.key, [4, 5], 16)
        receiver.ends.received(T)
        np.testing.assert_array_equal(receiver.store.read([4, 5], 0, 16), sender.store.read([1, 2], 0, 16))


def test_chunks_leave_while_later_layers_and_tokens_are_computed() -> None:
    config = TransferConfig(chunk_bytes=4096, ring_slots=1)  # the second chunk leaves when the first is acknowledged
    with pair(config=config) as (sender, receiver):
        arrived = threading.Semaphore(0)
        receiver.store.on_scatter = arrived.release
        receiver.expect(T, sender.key, [4, 5, 6, 7, 8, 9, 10, 11], 64)
        sender.endpoint.send(T, receiver.address, [], 64)
        for start in (0, 32):
            sender.endpoint.extend(T, [1 + start // 8 + i for i in range(4)])
            for layer in range(3):
                sender.endpoint.computed(T, layer, layer + 1, start, start + 32)
                if layer == 2:
                    assert arrived.acquire(timeout=WAIT_S), "nothing left before the end of the prefill"
        sender.endpoint.prefill_done(T)
        sender.endpoint.commit(T, b"")
        receiver.ends.received(T)
        assert sender.ends.sent(T).hidden_bytes > 0
        np.testing.assert_array_equal(
            receiver.store.read([4, 5, 6, 7, 8, 9, 10, 11], 0, 64), sender.store.read(list(range(1, 9)), 0, 64)
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_transfers_of_a_pair_share_its_ring(transport: str) -> None:
    with pair(transport=transport) as (sender, receiver):
        ids = [TransferId("request", attempt) for attempt in range(12)]
        for index, transfer in enumerate(ids):
            receiver.expect(transfer, sender.key, list(range(index * 4, index * 4 + 4)), 30, cached=index)
        for index, transfer in enumerate(ids):
            sender.push(transfer, receiver.address, list(range(50 - index * 4, 46 - index * 4, -1)), 30, bytes([index]))
        for index, transfer in enumerate(ids):
            assert receiver.ends.received(transfer) == bytes([index])
            np.testing.assert_array_equal(
                receiver.store.read(list(range(index * 4, index * 4 + 4)), index, 30),
                sender.store.read(list(range(50 - index * 4, 46 - index * 4, -1)), index, 30),
            )
        assert receiver.endpoint.counters.num_links_opened == 1


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


def test_a_cancel_before_the_offer_is_told_to_the_sender() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        receiver.endpoint.cancel(T)
        receiver.ends.receive_error(T)
        sender.push(T, receiver.address, [1], 8)
        assert sender.ends.send_error(T) == "cancelled by the receiver"


def test_cancelling_what_is_unknown_or_over_does_nothing() -> None:
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


def test_a_reservation_without_an_offer_and_an_offer_without_a_reservation_end_with_the_lease() -> None:
    config = TransferConfig(chunk_bytes=4096, heartbeat_s=0.05, dead_after_s=0.4, lease_s=0.2, max_lease_s=0.5)
    with pair(config=config) as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        assert "lease" in receiver.ends.receive_error(T)
        other = TransferId("other", 0)
        sender.push(other, receiver.address, [1], 8)
        assert "without a reservation" in sender.ends.send_error(other)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_layouts_that_differ_are_refused_by_the_name_of_the_field(transport: str) -> None:
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


def test_a_worker_that_was_replaced_is_not_mistaken_for_its_successor() -> None:
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


def test_a_forgotten_peer_is_fenced() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        sender.endpoint.send(T, receiver.address, [1], 8)
        receiver.endpoint.forget_peer(*sender.key)
        assert "is gone" in receiver.ends.receive_error(T)
        second = TransferId("request", 1)
        sender.push(second, receiver.address, [1], 8)
        assert sender.ends.send_error(second)
        third = TransferId("request", 2)
        receiver.expect(third, sender.key, [1], 8)
        assert "known to be gone" in receiver.ends.receive_error(third)
        sender.endpoint.forget_peer(*receiver.key)
        fourth = TransferId("request", 3)
        sender.push(fourth, receiver.address, [1], 8)
        assert "known to be gone" in sender.ends.send_error(fourth)


def test_what_the_store_cannot_do_ends_one_transfer_alone() -> None:
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


def test_an_idle_link_is_closed_and_opened_again_on_use() -> None:
    config = TransferConfig(chunk_bytes=4096, heartbeat_s=0.05, dead_after_s=5.0, max_idle_s=0.1)
    with pair(config=config) as (sender, receiver):
        for attempt in range(2):
            transfer = TransferId("request", attempt)
            receiver.expect(transfer, sender.key, [attempt], 8)
            sender.push(transfer, receiver.address, [1], 8)
            sender.ends.sent(transfer)
            closed = threading.Event()
            while sender.endpoint.counters.num_links_closed <= attempt:
                closed.wait(0.01)


def test_bad_arguments_are_refused_at_once() -> None:
    with pair() as (sender, receiver):
        with pytest.raises(ValueError, match="num_tokens: 17 is not valid, expected 1 to 16 for 2 blocks"):
            receiver.endpoint.expect(T, sender.key, [1, 2], 17)
        with pytest.raises(ValueError, match="num_cached_tokens: 9"):
            receiver.endpoint.expect(T, sender.key, [1], 8, 9)
        with pytest.raises(ValueError, match="num_tokens: 0"):
            sender.endpoint.send(T, receiver.address, [1], 0)
    with pytest.raises(ValueError, match="transport: 'pigeon'"):
        Worker("p", layout(), transport="pigeon")
    with pytest.raises(ValueError, match="chunk_bytes: 0"):
        TransferConfig(chunk_bytes=0)


def test_close_is_idempotent_and_ends_what_is_open() -> None:
    with pair(config=FAST) as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        sender.endpoint.send(T, receiver.address, [1], 8)
        sender.endpoint.close()
        sender.endpoint.close()
        assert sender.ends.send_error(T) == "the endpoint was closed"
        with pytest.raises(RuntimeError, match="not open"):
            sender.endpoint.send(TransferId("late", 0), receiver.address, [1], 8)
