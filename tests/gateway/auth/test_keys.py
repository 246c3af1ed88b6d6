"""API keys, and what they permit, as objects: no server, no clock."""

from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.gateway.auth.access import (
    Access,
    NotPermitted,
    RequiredAccess,
    Unauthenticated,
)
from pdserve.gateway.auth.keys import ApiKey, KeyRing, digest_of, make_key, new_key, parse_keys
from tests.gateway.auth.support import ALICE, BOB, PROM, admitted, shown, write


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
        ("min_priority=-1001", "min_priority: not valid, expected -1000 to 1000"),
        ("min_priority=--1", "min_priority: not valid, expected -1000 to 1000"),
        ("weight=0", "weight: not valid, expected 1 to 1000"),
        ("weight=1001", "weight: not valid, expected 1 to 1000"),
    ],
)
def test_an_invalid_word_is_refused(words: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_keys(f"{make_key('a', ALICE).line} {words}\n", "keys")


def test_all_words_of_a_line_are_read_back() -> None:
    key = make_key(
        "a",
        ALICE,
        is_admin=True,
        is_scraper=True,
        group="lab-1",
        min_priority=-5,
        weight=3,
        tokens_per_minute=5,
    )
    assert key.line.endswith(" admin metrics group=lab-1 min_priority=-5 weight=3 tokens_per_minute=5")
    assert parse_keys(key.line, "keys") == (key,)
