"""Clients hold bytes within their shares, and together never all of them."""

import pytest
from hypothesis import given, strategies as st

from pdserve.core.held_bytes import HeldBytes, Shares, TooLarge, TooManyBytes


def test_one_client_holds_a_quarter_of_what_the_others_leave() -> None:
    held = HeldBytes(1000)
    held.take("mallory", 250)
    with pytest.raises(TooManyBytes, match="at most 250 bytes of messages are held for one client"):
        held.take("mallory", 1)
    held.take("mike", 187)
    with pytest.raises(TooManyBytes, match="at most 187 bytes"):
        held.take("mike", 1)
    held.give_back("mallory", 250)
    held.take("mike", 63)
    assert held.total == 250


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


@given(st.integers(1, 12), st.integers(1, 300))
def test_each_client_that_fills_its_part_leaves_three_quarters(num: int, step: int) -> None:
    shares = Shares(10_000, 0.25)
    for client in range(num):
        shares.take(f"mallory{client}", shares.limit_of(f"mallory{client}") // step * step)
    assert shares.take("alice", int(10_000 * 0.75**num / 4))
    assert shares.total <= 10_000
