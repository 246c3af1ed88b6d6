"""Clients hold bytes within their shares, and together never all of them."""

import pytest
from hypothesis import given, strategies as st

from pdserve.core.held_bytes import HeldBytes, Shares, TooLarge, TooManyBytes


def test_each_client_leaves_the_next_one_its_part() -> None:
    held = HeldBytes(1000)
    for client, part in (("mallory", 250), ("mike", 150), ("max", 100)):
        held.take(client, part)
        with pytest.raises(TooManyBytes, match=f"{part} bytes of messages are held for one client"):
            held.take(client, 1)
    held.give_back("mallory", 250)
    held.take("mike", 75)
    assert held.total == 325


def test_a_use_gives_back_all_that_it_took_also_when_it_fails() -> None:
    held = HeldBytes(1000)
    with held.hold("alice", 100) as holding:
        holding.take(100)
        with pytest.raises(TooLarge):
            holding.take(100)
        assert held.total == holding.num_bytes == 200
    assert held.total == 0


def test_a_use_too_large_for_a_client_alone_is_told_from_one_that_may_be_retried() -> None:
    held = HeldBytes(1000, "answers")
    held.take("mallory", 250)
    with held.hold("alice", 100) as holding:
        with pytest.raises(TooManyBytes, match="retry"):
            holding.take(150)
        with pytest.raises(TooLarge, match="the answers of this call take more than 250 bytes"):
            holding.take(151)
        assert holding.num_bytes == 100


def fill(shares: Shares, client: str) -> None:
    """Takes as much as the client may have, of less than 2^30."""
    step = 1 << 29
    while step:
        if not shares.take(client, step):
            step //= 2


@given(st.integers(1, 40), st.sampled_from([1, 3]))
def test_clients_that_fill_their_parts_one_by_one_leave_a_fair_part(num: int, spare: int) -> None:
    shares = Shares(10**9, spare)
    for client in range(num):
        fill(shares, f"mallory{client}")
    free = 10**9 - shares.total
    assert free >= 10**9 * spare / (num + spare) - 1
    fill(shares, "alice")
    assert shares.of("alice") >= free // (num + 1 + spare)


@given(st.integers(1, 10), st.sampled_from([1, 3]), st.integers(0, 200))
def test_clients_that_want_much_come_to_equal_parts(num: int, spare: int, num_modest: int) -> None:
    """Each gives back an eighth now and then, and wants it again at once; others want little, and get it."""
    shares = Shares(1_000_000, spare)
    greedy = [f"mallory{client}" for client in range(num)]
    for client in greedy:
        fill(shares, client)
    for modest in range(num_modest):
        assert shares.take(f"alice{modest}", 10)
    for turn in range(20 * num):
        giver = turn % num
        shares.give_back(greedy[giver], shares.of(greedy[giver]) // 8)
        for client in greedy[giver:] + greedy[:giver]:
            fill(shares, client)
    part = (1_000_000 - 10 * num_modest) / (num + spare)
    assert [shares.of(client) for client in greedy] == [pytest.approx(part, rel=0.05)] * num


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1), st.booleans()), max_size=200))
def test_whatever_ten_clients_do_a_newcomer_gets_something(moves: list[tuple[int, float, bool]]) -> None:
    shares = Shares(10**9, 1)
    for number, part, takes in moves:
        client = f"mallory{number}"
        if not takes:
            shares.give_back(client, int(shares.of(client) * part))
        elif part < 0.5:
            fill(shares, client)
        else:
            shares.take(client, int(10**9 * (part - 0.5) ** 4))
    free = 10**9 - shares.total
    assert free >= 10**9 // 11**2
    assert shares.take("alice", free // 12)
