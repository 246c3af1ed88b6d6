"""A part that fails fails its transfer once, on both sides, and no block is freed while another part is under
way."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from pdserve.core.failures import FailureKind
from pdserve.core.request import TransferId

from .instances import Instance, instances
from .leftovers import TRANSPORTS, T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .support import CALM, MORTAL

PAIRS = [(2, 1), (1, 2), (2, 2), (4, 2)]
OTHER = TransferId("other", 0)


def assert_serves(sender: Instance, receiver: Instance, transfer: TransferId = OTHER) -> None:
    """The failure of one transfer is no other one's, and nothing is left of it in the tables."""
    receiver.stores[0].writable.clear()  # `expect` adds the blocks of this transfer alone
    receiver.expect(transfer, sender, [3], 8)
    sender.push(transfer, receiver, [60], 8)
    receiver.ends.received(transfer)
    sender.ends.sent(transfer)
    np.testing.assert_array_equal(receiver.read([3], 0, 8), sender.read([60], 0, 8))
    for port in (sender.port, receiver.port):
        assert not port.num_open


@pytest.mark.parametrize("ranks", PAIRS)
def test_a_corrupt_part_fails_the_transfer_once_on_both_sides(ranks: tuple[int, int]) -> None:
    with instances(*ranks) as (sender, receiver):
        store = sender.stores[-1]
        gather = store.gather
        store.gather = lambda *where: gather(*where) ^ 1
        receiver.expect(T, sender, [1, 2, 3], 24)
        sender.push(T, receiver, [4, 5, 6], 24)
        assert "do not have the announced checksum" in receiver.ends.receive_error(T)
        assert "do not have the announced checksum" in sender.ends.send_error(T)
        del store.gather
        assert_serves(sender, receiver)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_cancel_in_the_midst_of_the_parts_frees_every_block(transport: str, side: str) -> None:
    with instances(2, 2, transport=transport) as (sender, receiver):
        cancelling = sender if side == "sender" else receiver
        receiver.stores[0].on_scatter = lambda: cancelling.port.cancel(T)
        receiver.expect(T, sender, list(range(32)), 256)
        sender.port.send(T, receiver.address, list(range(32)), 256)
        sender.port.computed(T, 0, 3, 0, 200)
        assert "cancelled" in receiver.ends.receive_error(T)
        assert "cancelled" in sender.ends.send_error(T)
        assert_serves(sender, receiver)


def test_a_part_whose_reservation_does_not_come_ends_the_transfer_with_its_lease() -> None:
    with instances(2, 2, config=replace(CALM, lease_s=0.2, max_lease_s=0.4)) as (sender, receiver):
        receiver.hold(1)
        receiver.expect(T, sender, [1, 2], 16)
        sender.push(T, receiver, [4, 5], 16)
        assert "without a reservation" in sender.ends.send_error(T)
        receiver.port.cancel(T)  # as the router has it cancelled; one part has arrived
        assert ("receive", T) not in receiver.ends.endings, "a rank may still write its blocks"
        receiver.let_go(1)
        assert "cancelled" in receiver.ends.receive_error(T)
        assert_serves(sender, receiver)


def test_a_part_that_is_never_offered_ends_the_transfer_with_its_lease() -> None:
    with instances(2, 1, config=replace(CALM, lease_s=0.2, max_lease_s=0.4)) as (sender, receiver):
        receiver.expect(T, sender, [1, 2], 16)
        sender.hold(1)
        sender.push(T, receiver, [4, 5], 16)
        assert "without an offer" in receiver.ends.receive_error(T)
        assert ("send", T) not in sender.ends.endings, "a rank may still read its blocks"
        sender.let_go(1)
        assert sender.ends.send_error(T)
        assert_serves(sender, receiver)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_is_lost_fails_the_transfer_once(transport: str) -> None:
    with instances(2, 2, transport=transport, config=MORTAL) as (sender, receiver):
        assert_serves(sender, receiver)
        receiver.expect(T, sender, [1, 2], 16)
        sender.port.send(T, receiver.address, [4, 5], 16)
        sender.port.computed(T, 0, 3, 0, 8)
        receiver.endpoints[1].close()
        assert receiver.ends.receive_error(T)
        assert sender.ends.send_error(T)


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_store_failure_of_one_rank_fails_its_transfer_alone(side: str) -> None:
    with instances(2, 2) as (sender, receiver):
        store = (sender if side == "send" else receiver).stores[1]
        broken = "gather" if side == "send" else "scatter"

        def fail(*where: object) -> None:
            raise OSError("device lost")

        setattr(store, broken, fail)
        receiver.expect(T, sender, [1], 8)
        sender.push(T, receiver, [1], 8)
        assert "device lost" in sender.ends.send_error(T)
        assert "device lost" in receiver.ends.receive_error(T)
        delattr(store, broken)
        assert_serves(sender, receiver)
        assert receiver.endpoints[1].counters.num_nacks == 0


def test_an_instance_that_ends_fails_all_that_is_open() -> None:
    with instances(2, 2) as (sender, receiver):
        receiver.expect(T, sender, [1], 8)
        receiver.hold(1)
        receiver.expect(OTHER, sender, [2], 8)
        receiver.close()
        for transfer in (T, OTHER):
            assert receiver.ends.receive_error(transfer)
        with pytest.raises(RuntimeError, match="not open"):
            receiver.expect(TransferId("late", 0), sender, [3], 8)


def test_a_rank_that_cannot_begin_its_part_fails_the_transfer() -> None:
    with instances(2, 2) as (sender, receiver):
        sender.endpoints[1].close()
        receiver.expect(T, sender, [1], 8)
        sender.push(T, receiver, [1], 8)
        assert "not open" in sender.ends.send_error(T)
        receiver.port.cancel(T)  # as the router has it cancelled: nothing was offered
        assert "cancelled" in receiver.ends.receive_error(T)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_ranks": 1, "others": ()}, "this is rank 0 of 2 of d (incarnation 1), not rank 0 of 1"),
        ({"rank": 1}, "this is rank 0 of 2 of d (incarnation 1), not rank 1 of 2"),
    ],
)
def test_another_rank_than_the_address_says_is_refused_at_the_handshake(
    change: dict[str, object], error: str
) -> None:
    with instances(1, 2) as (sender, receiver):
        wrong = msgspec.structs.replace(receiver.address, **change)
        sender.port.send(T, wrong, [1], 8)
        assert error in sender.ends.send_error(T)


@pytest.mark.parametrize(
    "call",
    [
        lambda sender, receiver: receiver.port.expect(T, sender.key, [1], 8, 0, 3),
        lambda sender, receiver: sender.port.send(
            T, msgspec.structs.replace(receiver.address, num_ranks=3), [1], 8
        ),
        lambda sender, receiver: sender.port.send(
            T, msgspec.structs.replace(receiver.address, others=()), [1], 8
        ),
    ],
)
def test_numbers_of_ranks_that_do_not_fit_are_refused_at_once(
    call: Callable[[Instance, Instance], None],
) -> None:
    with instances(2, 2) as (sender, receiver):
        with pytest.raises(ValueError, match=r"num_ranks: 3|target: "):
            call(sender, receiver)
        assert_serves(sender, receiver)


def test_the_first_failure_is_the_one_that_both_sides_report() -> None:
    with instances(2, 2) as (sender, receiver):
        failed: list[TransferId] = []

        def fail() -> None:
            if not failed:
                failed.append(T)
                sender.port.cancel(T, "the engine failed", FailureKind.STORE)

        for store in receiver.stores:
            store.on_scatter = fail
        receiver.expect(T, sender, list(range(32)), 256)
        sender.port.send(T, receiver.address, list(range(32)), 256)
        sender.port.computed(T, 0, 3, 0, 200)
        assert sender.ends.send_error(T) == "the engine failed"
        assert receiver.ends.receive_error(T) == "the engine failed"
