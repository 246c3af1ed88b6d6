"""Two endpoints in one process, over real links: content, concurrency, and no leftover resources."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from pdserve.core.request import TransferId
from pdserve.kv_transfer import TransferConfig

from .leftovers import TRANSPORTS, T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .support import CALM, WAIT_S, Worker, layout, pair


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_sizes", [(8, 8), (4, 16), (16, 8)])
def test_kv_arrives_unchanged_whatever_the_block_sizes(
    transport: str, dtype: str, block_sizes: tuple[int, int]
) -> None:
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
        np.testing.assert_array_equal(
            receiver.store.read([4, 2, 6], 11, 20), sender.store.read([1, 2, 3], 11, 20)
        )


def test_a_wholly_cached_prompt_sends_nothing_and_is_received() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8, cached=8)
        sender.push(T, receiver.address, [1], 8, b"x")
        assert receiver.ends.received(T) == b"x"
        assert sender.ends.sent(T).num_chunks == 0


def test_an_offer_may_precede_its_reservation() -> None:
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
    # the second chunk leaves when the first is acknowledged
    with pair(config=replace(CALM, ring_slots=1)) as (sender, receiver):
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
            receiver.store.read([4, 5, 6, 7, 8, 9, 10, 11], 0, 64),
            sender.store.read(list(range(1, 9)), 0, 64),
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_transfers_of_a_pair_share_its_ring(transport: str) -> None:
    with pair(transport=transport) as (sender, receiver):
        ids = [TransferId("request", attempt) for attempt in range(12)]
        for index, transfer in enumerate(ids):
            receiver.expect(transfer, sender.key, list(range(index * 4, index * 4 + 4)), 30, cached=index)
        for index, transfer in enumerate(ids):
            sender.push(
                transfer,
                receiver.address,
                list(range(50 - index * 4, 46 - index * 4, -1)),
                30,
                bytes([index]),
            )
        for index, transfer in enumerate(ids):
            assert receiver.ends.received(transfer) == bytes([index])
            np.testing.assert_array_equal(
                receiver.store.read(list(range(index * 4, index * 4 + 4)), index, 30),
                sender.store.read(list(range(50 - index * 4, 46 - index * 4, -1)), index, 30),
            )
        assert receiver.endpoint.counters.num_links_opened == 1


def test_an_idle_link_is_closed_and_opened_again_on_use() -> None:
    with pair(config=replace(CALM, max_idle_s=0.1)) as (sender, receiver):
        for attempt in range(2):
            transfer = TransferId("request", attempt)
            receiver.expect(transfer, sender.key, [attempt], 8)
            sender.push(transfer, receiver.address, [1], 8)
            sender.ends.sent(transfer)
            closed = threading.Event()
            while sender.endpoint.counters.num_links_closed <= attempt:
                closed.wait(0.01)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["send", "receive"])
def test_links_beyond_the_bound_close_on_both_ends_and_open_again_on_use(side: str, transport: str) -> None:
    """Three workers take turns with one that keeps a single link; no transfer fails."""
    one_link, others = replace(CALM, max_links=1), [f"w{number}" for number in range(3)]
    with ExitStack() as stack:

        def worker(name: str, seed: int | None, config: TransferConfig) -> Worker:
            made = Worker(name, layout(), seed=seed, transport=transport, config=config)
            stack.callback(made.endpoint.close)
            return made

        bounded = worker("bounded", 1 if side == "send" else None, one_link)
        peers = [worker(name, None if side == "send" else 1, CALM) for name in others]
        for attempt in range(2):
            for number, peer in enumerate(peers):
                sender, receiver = (bounded, peer) if side == "send" else (peer, bounded)
                transfer, block = TransferId(f"request{number}", attempt), 3 * attempt + number
                receiver.expect(transfer, sender.key, [block], 8)
                sender.push(transfer, receiver.address, [block + 6], 8, b"end")
                assert receiver.ends.received(transfer) == b"end"
                sender.ends.sent(transfer)
                np.testing.assert_array_equal(
                    receiver.store.read([block], 0, 8), sender.store.read([block + 6], 0, 8)
                )
            for end in (bounded, *peers):
                wait_until(partial(has_one_link_at_most, end))
            wait_until(lambda: sum(map(num_open_links, peers)) == 1)
        counts = bounded.endpoint.counters
        assert counts.num_links_opened == counts.num_links_closed + 1 > len(peers)
        assert not sum(w.endpoint.counters.num_send_failures for w in (bounded, *peers))
        assert not sum(w.endpoint.counters.num_receive_failures for w in (bounded, *peers))


def num_open_links(worker: Worker) -> int:
    counters = worker.endpoint.counters
    return counters.num_links_opened - counters.num_links_closed


def has_one_link_at_most(worker: Worker) -> bool:
    return num_open_links(worker) <= 1


def wait_until(condition: Callable[[], bool]) -> None:
    pause, due_s = threading.Event(), time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < due_s, "it did not come about"
        pause.wait(0.01)


def test_bad_arguments_are_refused_at_once() -> None:
    with pair() as (sender, receiver):
        with pytest.raises(ValueError, match="num_tokens: 17 is not valid, expected 1 to 16 for 2 blocks"):
            receiver.endpoint.expect(T, sender.key, [1, 2], 17)
        with pytest.raises(ValueError, match="num_cached_tokens: 9"):
            receiver.endpoint.expect(T, sender.key, [1], 8, 9)
        with pytest.raises(ValueError, match="num_tokens: 0"):
            sender.endpoint.send(T, receiver.address, [1], 0)
    with pytest.raises(ValueError, match="got 'pigeon', expected one of auto, shm, gloo on a processor"):
        Worker("p", layout(), transport="pigeon")
    with pytest.raises(ValueError, match="chunk_bytes: 0"):
        TransferConfig(chunk_bytes=0)


def test_close_is_idempotent_and_ends_open_transfers() -> None:
    with pair() as (sender, receiver):
        receiver.expect(T, sender.key, [1], 8)
        sender.endpoint.send(T, receiver.address, [1], 8)
        sender.endpoint.close()
        sender.endpoint.close()
        assert sender.ends.send_error(T) == "the endpoint was closed"
        with pytest.raises(RuntimeError, match="not open"):
            sender.endpoint.send(TransferId("late", 0), receiver.address, [1], 8)
