"""Transfers between instances of unequal tensor parallelism, over real links: each head arrives where it is
held."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import pytest

from pdserve.core.request import TransferId
from pdserve.kv_transfer.parts import parts

from .instances import Instance, instances
from .support import CALM, layout

RANKS = (1, 2, 4, 8)
FEW_LINKS = replace(CALM, max_links=8)  # those of one pair of instances
Make = Callable[[str, int], Instance]
numbers = count()


@pytest.fixture(scope="module", params=[2, 8], ids=["2 heads", "8 heads"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Returns P or D by its number of ranks, with different block sizes; the tests of this module share
    them."""
    with ExitStack() as stack:

        @cache
        def made(name: str, num_ranks: int) -> Instance:
            block_size, seed = (8, 1) if name == "p" else (16, None)
            kv_layout = layout(block_size, num_kv_heads=request.param, num_layers=2)
            one = Instance(f"{name}-{num_ranks}", kv_layout, num_ranks, seed=seed, config=FEW_LINKS)
            stack.callback(one.close)
            return one

        yield made


@pytest.mark.parametrize("num_receivers", RANKS)
@pytest.mark.parametrize("num_senders", RANKS)
def test_kv_arrives_unchanged_whatever_the_numbers_of_ranks(
    make: Make, num_senders: int, num_receivers: int
) -> None:
    sender, receiver = make("p", num_senders), make("d", num_receivers)
    num_kv_heads = sender.layout.num_kv_heads
    transfer = TransferId("request", next(numbers))
    theirs, ours = list(range(20, 0, -1)), [7, 3, 11, 30]
    before = receiver.read(ours, 0, 64)
    receiver.expect(transfer, sender, ours, 61, cached=5)
    sender.push(transfer, receiver, theirs, 61, b"first token")
    assert receiver.ends.received(transfer) == b"first token"
    stats = sender.ends.sent(transfer)
    moved = parts(num_kv_heads, num_senders, num_receivers)
    num_copies = sum(len(part.heads) for part in moved)
    assert stats.num_bytes == 56 * sender.layout.bytes_per_token // num_kv_heads * num_copies
    np.testing.assert_array_equal(receiver.read(ours, 5, 61), sender.read(theirs, 5, 61))
    np.testing.assert_array_equal(receiver.read(ours, 0, 5), before[:, :, :, :5])
    np.testing.assert_array_equal(receiver.read(ours, 61, 64), before[:, :, :, 61:])


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2)])
def test_parts_travel_over_sockets_too(ranks: tuple[int, int]) -> None:
    with instances(*ranks, transport="gloo") as (sender, receiver):
        transfer = TransferId("request", 0)
        receiver.expect(transfer, sender, [4, 5], 16)
        sender.push(transfer, receiver, [1, 2], 16, b"end")
        assert receiver.ends.received(transfer) == b"end"
        sender.ends.sent(transfer)
        np.testing.assert_array_equal(receiver.read([4, 5], 0, 16), sender.read([1, 2], 0, 16))


def test_many_transfers_share_the_links_of_the_ranks(make: Make) -> None:
    sender, receiver = make("p", 4), make("d", 2)
    ids = [TransferId("request", next(numbers)) for _ in range(8)]
    for index, transfer in enumerate(ids):
        receiver.expect(transfer, sender, [4 * index, 4 * index + 1], 30, cached=index)
    for index, transfer in enumerate(ids):
        sender.push(transfer, receiver, list(range(index, index + 4)), 30, bytes([index]))
    for index, transfer in enumerate(ids):
        assert receiver.ends.received(transfer) == bytes([index])
        sender.ends.sent(transfer)
        np.testing.assert_array_equal(
            receiver.read([4 * index, 4 * index + 1], index, 30),
            sender.read(list(range(index, index + 4)), index, 30),
        )


def test_chunks_of_a_late_rank_leave_when_it_has_computed_them(make: Make) -> None:
    sender, receiver = make("p", 2), make("d", 1)
    transfer = TransferId("request", next(numbers))
    receiver.expect(transfer, sender, [1, 2], 32)
    sender.hold(1)
    sender.port.send(transfer, receiver.address, (), 32)
    for start in (0, 16):
        sender.port.extend(transfer, (3 + start // 8, 4 + start // 8))
        sender.port.computed(transfer, 0, 2, start, start + 16)
    sender.port.commit(transfer, b"late")
    assert ("receive", transfer) not in receiver.ends.endings
    sender.let_go(1)
    assert receiver.ends.received(transfer) == b"late"
    sender.ends.sent(transfer)
    np.testing.assert_array_equal(receiver.read([1, 2], 0, 32), sender.read([3, 4, 5, 6], 0, 32))
