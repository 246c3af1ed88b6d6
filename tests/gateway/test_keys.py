"""API keys and rates, as objects: no server, no clock."""

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.request import Request, SamplingParams
from pdserve.gateway.access import Access, Caller, Need, NotPermitted, RateLimited, Unauthenticated
from pdserve.gateway.keys import ApiKey, KeyRing, digest_of, make_key, new_key, parse_keys
from pdserve.gateway.rate_limit import TokenBucket

ALICE, BOB = new_key(), new_key()


def shown(key: str) -> str:
    return f"Bearer {key}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, make_key("alice", ALICE, requests_per_minute=2, tokens_per_minute=600), make_key("bob", BOB, is_admin=True))
    return path


def write(path: Path, *keys: ApiKey) -> None:
    path.write_text("# who may come in\n\n" + "".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)


def request_of(num_prompt: int, max_tokens: int, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(request_id="r", prompt_token_ids=tuple(range(num_prompt)), sampling=sampling)


def admitted(access: Access, need: Need, key: str, now_s: float = 0.0) -> Caller:
    caller = access.admit(need, shown(key), now_s)
    assert caller is not None
    return caller


def test_a_line_says_all_of_a_key_but_the_key(file: Path) -> None:
    for key in parse_keys(file.read_text(), "keys"):
        assert parse_keys(key.line, "keys") == (key,)
    assert ALICE not in file.read_text() and digest_of(ALICE).hex() in file.read_text()


def test_mistakes_are_told_by_line_and_without_what_stands_there() -> None:
    good = make_key("a", ALICE).line
    text = f"{good}\n{ALICE}\nb sha256:12\n-x {good.split()[1]}\n{good} requests_per_minute=0\n{good} speed=1\n{good}\n"
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys")
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["keys:2:", "keys:3:", "keys:4:", "keys:5:", "keys:6:", "keys:"]
    assert ALICE not in str(caught.value) and digest_of(ALICE).hex() not in str(caught.value)


@pytest.mark.parametrize(
    "value", [None, "", ALICE, f"Basic {ALICE}", "Bearer ", f"Bearer {ALICE}x", shown(new_key()), "Bearer \udcff"]
)
def test_nobody_comes_in_without_a_known_key(file: Path, value: str | None) -> None:
    for need in (Need.KEY, Need.REQUEST, Need.ADMIN):
        with pytest.raises(Unauthenticated, match="expected `Bearer KEY`"):
            Access(str(file)).admit(need, value, 0.0)
    assert Access(str(file)).admit(Need.NOTHING, value, 0.0) is None


def test_hashes_with_the_same_beginning_are_told_apart() -> None:
    twin = ApiKey("twin", digest_of(ALICE)[:4] + bytes(28))
    assert KeyRing([twin]).find(ALICE) is None
    assert KeyRing([twin, make_key("alice", ALICE), twin]).find(ALICE) == make_key("alice", ALICE)


def test_only_keys_that_are_marked_administer(file: Path) -> None:
    access = Access(str(file))
    assert admitted(access, Need.ADMIN, BOB).name == "bob"
    with pytest.raises(NotPermitted, match="alice"):
        access.admit(Need.ADMIN, shown(ALICE), 0.0)


def test_requests_beyond_the_rate_are_refused_with_the_time_to_wait(file: Path) -> None:
    access = Access(str(file))
    for _ in range(2):
        admitted(access, Need.REQUEST, ALICE)
    with pytest.raises(RateLimited) as caught:
        access.admit(Need.REQUEST, shown(ALICE), 10.0)
    assert caught.value.retry_after_s == pytest.approx(20.0)
    admitted(access, Need.KEY, ALICE, 10.0)
    admitted(access, Need.REQUEST, BOB, 10.0)
    admitted(access, Need.REQUEST, ALICE, 30.0)


def test_tokens_are_taken_for_all_that_may_be_produced_and_given_back_for_what_was_not(file: Path) -> None:
    access = Access(str(file))
    caller = admitted(access, Need.KEY, ALICE)
    charge = access.charge(caller, request_of(100, 100, n=5), 0.0)
    with pytest.raises(RateLimited, match="tokens_per_minute is 600"):
        access.charge(caller, request_of(1, 1), 0.0)
    charge.settle(20, 0.0)
    charge.settle(0, 0.0)  # a second time changes nothing
    access.charge(caller, request_of(400, 80), 0.0)
    with pytest.raises(RateLimited):
        access.charge(caller, request_of(1, 1), 0.0)


def test_a_request_that_was_refused_costs_nothing(file: Path) -> None:
    access = Access(str(file))
    caller = admitted(access, Need.KEY, ALICE)
    for _ in range(5):
        access.charge(caller, request_of(500, 100), 0.0).settle(0, 0.0, has_begun=False)


def test_a_key_without_limits_has_none(file: Path) -> None:
    access = Access(str(file))
    for _ in range(100):
        access.charge(admitted(access, Need.REQUEST, BOB), request_of(1000, 1000), 0.0)


def test_keys_that_are_added_or_taken_away_count_without_a_restart(file: Path) -> None:
    access = Access(str(file))
    admitted(access, Need.KEY, ALICE)
    write(file, make_key("carol", carol := new_key()))
    admitted(access, Need.KEY, ALICE, 0.5)  # it is not looked at all the time
    admitted(access, Need.KEY, carol, 1.5)
    with pytest.raises(Unauthenticated):
        access.admit(Need.KEY, shown(ALICE), 1.5)


def test_what_a_key_has_used_up_stays_used_up_when_the_file_changes(file: Path) -> None:
    access = Access(str(file))
    for _ in range(2):
        admitted(access, Need.REQUEST, ALICE)
    write(file, make_key("alice", ALICE, requests_per_minute=2))
    with pytest.raises(RateLimited):
        access.admit(Need.REQUEST, shown(ALICE), 5.0)


def test_a_file_that_is_wrong_or_gone_leaves_the_keys_in_force(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = Access(str(file))
    file.write_text("nonsense\n")
    admitted(access, Need.KEY, ALICE, 2.0)
    file.unlink()
    admitted(access, Need.KEY, ALICE, 4.0)
    admitted(access, Need.KEY, ALICE, 6.0)
    assert len([record for record in caplog.records if "going on with the keys" in record.message]) == 2


@pytest.mark.parametrize(
    ("data", "mode", "problem"),
    [
        (None, 0, r"a file that can be read \(No such file"),
        (b"", 0o620, r"nobody but its owner can write \(chmod go-w\)"),
        (b"\xff", 0o600, "UTF-8"),
        (b"#" * (5 << 20), 0o600, "at most"),
        (b"alice", 0o600, "keys:1: no sha256:"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_start(tmp_path: Path, data: bytes | None, mode: int, problem: str) -> None:
    path = tmp_path / "keys"
    if data is not None:
        path.write_bytes(data)
        os.chmod(path, mode)
    with pytest.raises(ConfigError, match=problem):
        Access(str(path))


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2000), st.booleans()), max_size=30),
)
def test_a_bucket_lets_through_no_more_than_a_minutes_worth_and_what_time_brings(
    per_minute: int, steps: list[tuple[float, int, bool]]
) -> None:
    bucket, now_s, taken, largest = TokenBucket(per_minute, 0.0), 0.0, 0.0, 0
    for passed_s, amount, waits in steps:
        now_s += passed_s
        delay_s = bucket.take(amount, now_s)
        if delay_s and waits:
            now_s += delay_s + 1e-6
            assert bucket.take(amount, now_s) == 0.0  # what was promised holds
            delay_s = 0.0
        if not delay_s:
            taken += amount
            largest = max(largest, amount)
        assert taken <= per_minute + now_s * per_minute / 60 + largest + 1e-3


def test_time_that_goes_back_brings_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    assert bucket.take(60, 100.0) == 0.0
    assert bucket.take(1, 0.0) > 0
    assert bucket.take(1, 100.5) > 0
    assert bucket.take(1, 101.0) == 0.0
