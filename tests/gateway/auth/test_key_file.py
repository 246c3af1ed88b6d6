"""The key file while the server runs: changed, replaced, missing, unsafe."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.gateway.auth import key_file
from pdserve.gateway.auth.access import (
    Access,
    NotPermitted,
    RateLimited,
    RequiredAccess,
    Revoked,
    Unauthenticated,
)
from pdserve.gateway.auth.key_file import MISSING_GRACE_S
from pdserve.gateway.auth.keys import ApiKey, make_key, new_key
from pdserve.gateway.auth.secret_files import expected_rights
from tests.gateway.auth.support import ALICE, BOB, admitted, shown, write

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


def test_a_directory_in_the_files_place_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """A missing file becomes a directory when it is mounted into a container."""
    path = tmp_path / "keys"
    path.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(ConfigError, match="a file, not a directory"):
            Access(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
