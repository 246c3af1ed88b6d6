"""The rates of keys, as objects: no server, no clock."""

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pdserve.gateway.auth.access import (
    Access,
    RateLimited,
    RequiredAccess,
)
from pdserve.gateway.auth.keys import make_key
from pdserve.gateway.auth.rate_limit import TokenBucket
from tests.gateway.auth.support import ALICE, BOB, admitted, price_of, shown, write


def test_requests_beyond_the_rate_are_refused_with_a_retry_delay(file: Path) -> None:
    access = Access(str(file))
    for _ in range(2):
        admitted(access, RequiredAccess.REQUEST, ALICE)
    with pytest.raises(RateLimited) as caught:
        access.admit(RequiredAccess.REQUEST, shown(ALICE), 10.0)
    assert caught.value.retry_after_s == pytest.approx(20.0)
    admitted(access, RequiredAccess.KEY, ALICE, 10.0)
    admitted(access, RequiredAccess.REQUEST, BOB, 10.0)
    admitted(access, RequiredAccess.REQUEST, ALICE, 30.0)


def test_possible_tokens_are_charged_and_unproduced_ones_refunded(file: Path) -> None:
    write(file, make_key("alice", ALICE, tokens_per_minute=600))
    access = Access(str(file))
    caller = admitted(access, RequiredAccess.KEY, ALICE)
    (charge,) = access.charge(caller, [price_of(100, 100, n=5)], 0.0)
    with pytest.raises(RateLimited, match="tokens_per_minute is 600"):
        access.charge(caller, [price_of(1, 1)], 0.0)
    charge.settle(20, 0.0)
    charge.settle(0, 0.0)  # a second time changes nothing
    access.charge(caller, [price_of(400, 80)], 0.0)
    with pytest.raises(RateLimited):
        access.charge(caller, [price_of(1, 1)], 0.0)


def test_a_request_refused_before_tokenisation_costs_no_tokens(file: Path) -> None:
    write(file, make_key("alice", ALICE, tokens_per_minute=600))
    access = Access(str(file))
    caller = admitted(access, RequiredAccess.KEY, ALICE)
    for _ in range(5):
        (charge,) = access.charge(caller, [price_of(500, 100)], 0.0)
        charge.settle(0, 0.0, has_begun=False)


def test_prompts_and_choices_of_one_call_count_as_requests(file: Path) -> None:
    write(file, make_key("alice", ALICE, requests_per_minute=10))
    access = Access(str(file))
    access.charge(admitted(access, RequiredAccess.REQUEST, ALICE), [price_of(1, 1, n=2)] * 4, 0.0)  # 8 of 10
    caller = admitted(access, RequiredAccess.REQUEST, ALICE)
    with pytest.raises(RateLimited, match="requests_per_minute is 10"):
        access.charge(caller, [price_of(1, 1, n=3)], 0.0)
    access.charge(caller, [price_of(1, 1, n=2)], 0.0)
    with pytest.raises(RateLimited):
        access.admit(RequiredAccess.REQUEST, shown(ALICE), 0.0)


def test_a_call_above_the_rate_passes_once_its_bucket_is_full(file: Path) -> None:
    """Its first request is counted on admission: the others wait for the rest of a minute, not for one
    more."""
    write(file, make_key("alice", ALICE, requests_per_minute=3))
    access = Access(str(file))
    admitted(access, RequiredAccess.REQUEST, ALICE)
    caller = admitted(access, RequiredAccess.REQUEST, ALICE)
    with pytest.raises(RateLimited) as caught:
        access.charge(caller, [price_of(1, 1)] * 16, 0.0)
    now_s = caught.value.retry_after_s
    access.charge(admitted(access, RequiredAccess.REQUEST, ALICE, now_s), [price_of(1, 1)] * 16, now_s)
    with pytest.raises(RateLimited) as caught:
        access.admit(RequiredAccess.REQUEST, shown(ALICE), now_s)
    assert caught.value.retry_after_s == pytest.approx(14 * 20.0)


def test_a_call_refused_by_one_rate_charges_no_other(file: Path) -> None:
    write(file, make_key("alice", ALICE, requests_per_minute=4, tokens_per_minute=100))
    access = Access(str(file))
    caller = admitted(access, RequiredAccess.REQUEST, ALICE)
    access.charge(caller, [price_of(1, 0)], 0.0)
    with pytest.raises(RateLimited, match="requests_per_minute"):
        access.charge(
            admitted(access, RequiredAccess.REQUEST, ALICE), [price_of(90, 0)] + [price_of(1, 0)] * 9, 0.0
        )
    access.charge(caller, [price_of(99, 0)], 0.0)


def test_a_key_without_limits_has_none(file: Path) -> None:
    access = Access(str(file))
    for _ in range(100):
        access.charge(admitted(access, RequiredAccess.REQUEST, BOB), [price_of(1000, 1000, n=16)] * 64, 0.0)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2000), st.booleans()), max_size=30),
)
def test_a_bucket_admits_at_most_its_burst_plus_its_refill(
    per_minute: int, steps: list[tuple[float, int, bool]]
) -> None:
    bucket, now_s, taken, largest = TokenBucket(per_minute, 0.0), 0.0, 0.0, 0
    for passed_s, amount, waits in steps:
        now_s += passed_s
        delay_s = bucket.take(amount, now_s)
        if delay_s and waits:
            now_s += delay_s + 1e-6
            assert bucket.take(amount, now_s) == 0.0  # the promised delay suffices
            delay_s = 0.0
        if not delay_s:
            taken += amount
            largest = max(largest, amount)
        assert taken <= per_minute + now_s * per_minute / 60 + largest + 1e-3


def test_a_clock_that_goes_back_refills_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    assert bucket.take(60, 100.0) == 0.0
    assert bucket.take(1, 0.0) > 0
    assert bucket.take(1, 100.5) > 0
    assert bucket.take(1, 101.0) == 0.0
