"""API keys and rates, as objects: no server, no clock."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pdserve.core.errors import ConfigError
from pdserve.gateway.auth import key_file
from pdserve.gateway.auth.access import (
    Access,
    Caller,
    NotPermitted,
    RateLimited,
    RequiredAccess,
    Revoked,
    Unauthenticated,
)
from pdserve.gateway.auth.cost import Price
from pdserve.gateway.auth.key_file import MISSING_GRACE_S
from pdserve.gateway.auth.keys import ApiKey, KeyRing, digest_of, make_key, new_key, parse_keys
from pdserve.gateway.auth.rate_limit import TokenBucket
from pdserve.gateway.auth.secret_files import expected_rights

ALICE, BOB, PROM = new_key(), new_key(), new_key()

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    euid = os.geteuid()
    if euid == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(euid)


def shown(key: str) -> str:
    return f"Bearer {key}"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to the file take effect at once."""
    monkeypatch.setattr(key_file, "SETTLE_S", 0.0)
    path = tmp_path / "keys"
    write(
        path,
        make_key("alice", ALICE, requests_per_minute=2, tokens_per_minute=600),
        make_key("bob", BOB, is_admin=True),
    )
    return path


def write(path: Path, *keys: ApiKey) -> None:
    path.write_text("# who may come in\n\n" + "".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)


def price_of(num_prompt: int, max_tokens: int, n: int = 1) -> Price:
    return Price(num_prompt_tokens=num_prompt, num_choices=n, max_tokens=max_tokens)


def admitted(access: Access, need: RequiredAccess, key: str, now_s: float = 0.0) -> Caller:
    caller = access.admit(need, shown(key), now_s)
    assert caller is not None
    return caller


def test_a_line_describes_a_key_without_revealing_it(file: Path) -> None:
    for key in parse_keys(file.read_text(), "keys"):
        assert parse_keys(key.line, "keys") == (key,)
    assert ALICE not in file.read_text() and digest_of(ALICE).hex() in file.read_text()


def test_mistakes_are_reported_by_line_without_its_content() -> None:
    good = make_key("a", ALICE).line
    text = (
        f"{good}\n{ALICE}\nb sha256:12\n-x {good.split()[1]}\n{good} requests_per_minute=0\n{good}"
        f" speed=1\n{good}\n"
    )
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys")
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "keys:2:",
        "keys:3:",
        "keys:4:",
        "keys:5:",
        "keys:6:",
        "keys:",
    ]
    assert ALICE not in str(caught.value) and digest_of(ALICE).hex() not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [None, "", ALICE, f"Basic {ALICE}", "Bearer ", f"Bearer {ALICE}x", shown(new_key()), "Bearer \udcff"],
)
def test_a_client_without_a_known_key_is_refused(file: Path, value: str | None) -> None:
    for need in (RequiredAccess.KEY, RequiredAccess.REQUEST, RequiredAccess.ADMIN):
        with pytest.raises(Unauthenticated, match="expected `Bearer KEY`"):
            Access(str(file)).admit(need, value, 0.0)
    assert Access(str(file)).admit(RequiredAccess.NOTHING, value, 0.0) is None


def test_a_key_is_recognised_where_none_is_needed(file: Path) -> None:
    assert admitted(Access(str(file)), RequiredAccess.NOTHING, ALICE).name == "alice"


def test_hashes_with_the_same_prefix_are_distinguished() -> None:
    colliding = ApiKey("colliding", digest_of(ALICE)[:4] + bytes(28))
    assert KeyRing([colliding]).find(ALICE) is None
    assert KeyRing([colliding, make_key("alice", ALICE), colliding]).find(ALICE) == make_key("alice", ALICE)


def test_only_marked_keys_read_metrics(file: Path) -> None:
    write(
        file,
        make_key("alice", ALICE),
        make_key("bob", BOB, is_admin=True),
        make_key("prom", PROM, is_scraper=True),
    )
    access = Access(str(file))
    assert {admitted(access, RequiredAccess.METRICS, key).name for key in (BOB, PROM)} == {"bob", "prom"}
    with pytest.raises(NotPermitted, match="alice: this key may not read metrics"):
        access.admit(RequiredAccess.METRICS, shown(ALICE), 0.0)
    with pytest.raises(NotPermitted):
        access.admit(RequiredAccess.ADMIN, shown(PROM), 0.0)


def test_only_marked_keys_administer(file: Path) -> None:
    access = Access(str(file))
    assert admitted(access, RequiredAccess.ADMIN, BOB).name == "bob"
    with pytest.raises(NotPermitted, match="alice"):
        access.admit(RequiredAccess.ADMIN, shown(ALICE), 0.0)


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


def test_added_and_removed_keys_take_effect_at_once(file: Path) -> None:
    access = Access(str(file))
    alice = admitted(access, RequiredAccess.KEY, ALICE)
    write(file, make_key("carol", carol := new_key()))
    admitted(access, RequiredAccess.KEY, carol)
    with pytest.raises(Unauthenticated):
        access.admit(RequiredAccess.KEY, shown(ALICE), 0.0)
    with pytest.raises(Revoked, match="alice"):
        access.check_still(alice, RequiredAccess.REQUEST)


def test_a_call_continues_only_while_its_key_permits_it(file: Path) -> None:
    access = Access(str(file))
    bob = admitted(access, RequiredAccess.ADMIN, BOB)
    write(file, make_key("bob", BOB))
    access.look(0.0)
    access.check_still(bob, RequiredAccess.REQUEST)
    with pytest.raises(NotPermitted, match="administer"):
        access.check_still(bob, RequiredAccess.ADMIN)
    write(file, make_key("robert", BOB))  # another's now: open calls count for the old name
    access.look(0.0)
    with pytest.raises(Revoked):
        access.check_still(bob, RequiredAccess.REQUEST)
    access.check_still(bob, RequiredAccess.NOTHING)


def test_a_keys_usage_survives_changes_of_the_file(file: Path) -> None:
    access = Access(str(file))
    for _ in range(2):
        admitted(access, RequiredAccess.REQUEST, ALICE)
    write(file, make_key("alice", ALICE, requests_per_minute=2))
    with pytest.raises(RateLimited):
        access.admit(RequiredAccess.REQUEST, shown(ALICE), 5.0)


def test_a_half_written_file_neither_drops_nor_widens_a_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "SETTLE_S", 0.2)
    access = Access(str(file))
    text = file.read_text()
    last = make_key("carol", new_key()).line
    for now_s, length in enumerate(range(0, len(text), 5)):
        file.write_text(text[:length])  # as far as it is written
        access.look(0.15 * now_s)
        assert access.names == ("alice", "bob")
        for _ in range(2):
            with suppress(RateLimited):
                admitted(access, RequiredAccess.REQUEST, ALICE, 0.15 * now_s)
    file.write_text(text + last)
    access.look(100.0)
    assert access.names == ("alice", "bob")
    access.look(100.2)
    assert list(access.names) == ["alice", "bob", "carol"]


def test_a_file_that_changes_while_it_is_read_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(str(file))
    read, text = key_file._read, file.read_text()

    def read_half(path: Path) -> tuple[ApiKey, ...]:
        file.write_text(text.splitlines(keepends=True)[0])
        keys = read(path)
        file.write_text(text)
        return keys

    file.write_text(text + "#\n")
    monkeypatch.setattr(key_file, "_read", read_half)
    access.look(0.0)
    monkeypatch.setattr(key_file, "_read", read)
    assert access.names == ("alice", "bob")
    access.look(0.0)
    assert access.names == ("alice", "bob")


def test_another_users_link_to_the_file_leaves_the_keys_in_force(file: Path, tmp_path: Path) -> None:
    """The link's target must belong to the server's user as well."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    access = Access(str(file))
    other = tmp_path / "other"
    write(other, make_key("mallory", mallory := new_key(), is_admin=True))
    os.chown(other, NOBODY, -1)
    file.unlink()
    file.symlink_to(other)
    with pytest.raises(Unauthenticated):
        access.admit(RequiredAccess.KEY, shown(mallory), 0.0)
    admitted(access, RequiredAccess.KEY, ALICE)


@pytest.mark.parametrize("change", ["text", "mode", "owner"])
def test_a_file_that_becomes_invalid_leaves_the_keys_in_force(
    file: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    if change == "owner" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    access = Access(str(file))
    if change == "text":
        file.write_text("nonsense\n")
    elif change == "mode":
        file.chmod(0o604)
    else:
        os.chown(file, NOBODY, -1)
    for now_s in (0.0, 5.0, 10.0):
        admitted(access, RequiredAccess.KEY, ALICE, now_s)
    assert (
        len([record for record in caplog.records if "going on with the 2 keys before" in record.message]) == 1
    )


def test_a_missing_file_revokes_all_keys_after_a_moment(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = Access(str(file))
    text = file.read_text()
    for _ in range(2):
        alice = admitted(access, RequiredAccess.REQUEST, ALICE)
    file.unlink()
    admitted(access, RequiredAccess.KEY, ALICE)
    admitted(access, RequiredAccess.KEY, ALICE, MISSING_GRACE_S - 0.1)
    access.look(MISSING_GRACE_S)
    with pytest.raises(Revoked):
        access.check_still(alice, RequiredAccess.REQUEST)
    with pytest.raises(Unauthenticated):
        access.admit(RequiredAccess.KEY, shown(BOB), MISSING_GRACE_S)
    assert [record.levelname for record in caplog.records if "revoked" in record.message] == [
        "ERROR",
        "ERROR",
    ]
    file.write_text(text)
    file.chmod(0o600)
    admitted(access, RequiredAccess.KEY, ALICE, MISSING_GRACE_S)
    with pytest.raises(RateLimited):  # usage is kept, too
        access.admit(RequiredAccess.REQUEST, shown(ALICE), MISSING_GRACE_S)


def test_a_file_that_is_replaced_by_renaming_revokes_nothing(file: Path) -> None:
    access = Access(str(file))
    away = file.rename(file.with_suffix(".old"))
    admitted(access, RequiredAccess.KEY, ALICE)
    away.rename(file)
    for now_s in (1.0, 10.0):
        admitted(access, RequiredAccess.KEY, ALICE, now_s)


def test_a_file_that_becomes_unreadable_revokes_all_keys(file: Path) -> None:
    """Root may read everything, so it becomes another user for a while."""
    access = Access(str(file))
    file.chmod(0)
    with unprivileged():
        admitted(access, RequiredAccess.KEY, ALICE)
        with pytest.raises(Unauthenticated):
            access.admit(RequiredAccess.KEY, shown(ALICE), MISSING_GRACE_S)
    file.chmod(0o600)
    admitted(access, RequiredAccess.KEY, ALICE, MISSING_GRACE_S)


@pytest.mark.parametrize(
    ("data", "mode", "problem"),
    [
        (None, 0, r"a file that can be read \(No such file"),
        (b"", 0o620, r"its owner alone can write, not one of mode 620 \(chmod 600"),
        (b"", 0o604, "others cannot read"),
        (b"", 0o602, "its owner alone can write"),
        (b"\xff", 0o600, "UTF-8"),
        (b"#" * (5 << 20), 0o600, "at most"),
        (b"alice", 0o640, "keys:1: no sha256:"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_start(
    tmp_path: Path, data: bytes | None, mode: int, problem: str
) -> None:
    path = tmp_path / "keys"
    if data is not None:
        path.write_bytes(data)
        os.chmod(path, mode)
    with pytest.raises(ConfigError, match=problem):
        Access(str(path))


def test_a_file_of_another_user_is_refused(file: Path) -> None:
    """The owner can add a key at any time."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, NOBODY, -1)
    with pytest.raises(ConfigError, match=f"a file that belongs to root, not to uid {NOBODY}"):
        Access(str(file))


@pytest.mark.parametrize(
    ("owner", "euid", "mode", "is_right"),
    [
        (1000, 1000, 0o600, True),
        (0, 1000, 0o640, True),  # as a package or a container installs it
        (0, 1000, 0o400, True),
        (1001, 1000, 0o600, False),
        (1000, 0, 0o600, False),
        (1000, 1000, 0o660, False),
        (1000, 1000, 0o601, True),
        (1000, 1000, 0o644, False),
        (0, 0, 0o602, False),
    ],
)
def test_a_secret_belongs_to_the_server_and_is_unreadable_for_others(
    owner: int, euid: int, mode: int, is_right: bool
) -> None:
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 100, 0, 0, 0, 0))
    assert (expected_rights(status, euid) is None) is is_right


def test_a_pipe_in_place_of_the_file_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys", 0o600)
    with pytest.raises(ConfigError, match="a regular file"):
        Access(str(tmp_path / "keys"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("group=", "group: not valid"),
        ("group=a/b", "group: not valid"),
        ("group", "not known"),
        ("group=a group=b", "stands there twice"),
        ("metrics=1", "not known"),
        ("admin admin", "stands there twice"),
        ("tokens_per_minute", "not known"),
    ],
)
def test_an_invalid_word_is_refused(words: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_keys(f"{make_key('a', ALICE).line} {words}\n", "keys")


def test_all_words_of_a_line_are_read_back() -> None:
    key = make_key("a", ALICE, is_admin=True, is_scraper=True, group="lab-1", tokens_per_minute=5)
    assert key.line.endswith(" admin metrics group=lab-1 tokens_per_minute=5")
    assert parse_keys(key.line, "keys") == (key,)


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


def test_a_directory_in_the_files_place_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """A missing file becomes a directory when it is mounted into a container."""
    path = tmp_path / "keys"
    path.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(ConfigError, match="a file, not a directory"):
            Access(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
