"""The socket through which users administer their own clusters: found by its port, never in a folder that
others prepared."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.core import admin_socket
from pdserve.core.admin_socket import RUNTIME_FOLDER, UnsafeFolder

from ..other_user import NOBODY, needs_root, run_as_nobody

ADDRESS, OTHER = "127.0.0.1:50051", "127.0.0.1:50052"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime folder, not made yet."""
    monkeypatch.setenv(RUNTIME_FOLDER, str(tmp_path / "runtime"))
    return tmp_path / "runtime"


@pytest.fixture
def listening() -> Iterator[Path]:
    """The socket of a running cluster, in its run folder."""
    run_folder = tempfile.mkdtemp(prefix="pdserve-", dir="/tmp")
    path = Path(run_folder) / "grpc.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path
    shutil.rmtree(run_folder)


def test_the_folder_is_the_users_own_and_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNTIME_FOLDER, raising=False)
    assert admin_socket.runtime_folder() == Path(f"/tmp/pdserve-{os.getuid()}")
    monkeypatch.setenv(RUNTIME_FOLDER, "/run/user/7/pdserve")
    assert admin_socket.socket_link(ADDRESS) == Path("/run/user/7/pdserve/127.0.0.1_50051.sock")


def test_a_cluster_is_found_by_its_port_until_it_withdraws(folder: Path, listening: Path) -> None:
    assert admin_socket.find(ADDRESS) is None
    admin_socket.publish(ADDRESS, listening)
    assert admin_socket.find(ADDRESS) == listening and admin_socket.find(OTHER) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    admin_socket.withdraw(ADDRESS, listening)
    admin_socket.withdraw(ADDRESS, listening)
    assert admin_socket.find(ADDRESS) is None and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("listens", "asked", "is_found"),
    [
        ("127.0.0.1:1", "localhost:1", True),
        ("[::1]:1", "[0:0::1]:1", True),
        ("0.0.0.0:1", "127.0.0.1:1", True),
        ("[::]:1", "127.0.0.1:1", True),
        ("127.0.0.2:1", "127.0.0.1:1", False),
        ("[::1]:1", "127.0.0.1:1", False),
    ],
)
def test_clusters_on_several_addresses_are_distinguished(
    folder: Path, listening: Path, listens: str, asked: str, is_found: bool
) -> None:
    admin_socket.publish(listens, listening)
    assert (admin_socket.find(asked) == listening) is is_found


def test_a_dead_cluster_is_not_found_and_its_successor_replaces_it(folder: Path, listening: Path) -> None:
    dead = listening.parent / "dead.sock"
    admin_socket.publish(ADDRESS, dead)
    assert admin_socket.find(ADDRESS) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    assert admin_socket.find(ADDRESS) is None, "nobody listens there any more"
    admin_socket.publish(ADDRESS, listening)
    admin_socket.withdraw(ADDRESS, dead)
    assert admin_socket.find(ADDRESS) == listening


def test_a_run_folder_that_was_opened_to_others_is_not_trusted(folder: Path, listening: Path) -> None:
    """A cluster that was killed leaves a symlink behind, to a name in /tmp that any user can take once it is
    cleaned up."""
    admin_socket.publish(ADDRESS, listening)
    listening.parent.chmod(0o755)
    with pytest.raises(UnsafeFolder, match=f"{listening.parent}: its mode is 0755"):
        admin_socket.find(ADDRESS)


def linked(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(0o700)
    folder.symlink_to(elsewhere)


def opened(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o711)


def given_away(folder: Path) -> None:
    needs_root()
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)


def linked_by_another(folder: Path) -> None:
    needs_root()
    linked(folder)
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)


@pytest.mark.parametrize(
    ("squat", "why", "can_remove"),
    [
        (linked, "it is not a directory", True),
        (Path.touch, "it is not a directory", True),
        (opened, "its mode is 0711", True),
        (given_away, f"it belongs to the user with id {NOBODY}", False),
        (linked_by_another, f"it belongs to the user with id {NOBODY}", False),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda: admin_socket.find(ADDRESS),
        admin_socket.prepare,
        lambda: admin_socket.publish(ADDRESS, Path("/theirs")),
    ],
)
def test_a_squatted_folder_is_refused_by_both_sides(
    folder: Path, squat: Callable[[Path], None], why: str, can_remove: bool, use: Callable[[], object]
) -> None:
    squat(folder)
    with pytest.raises(UnsafeFolder, match=why) as caught:
        use()
    assert str(folder) in str(caught.value) and f"name another in {RUNTIME_FOLDER}" in str(caught.value)
    assert str(caught.value).endswith(", or remove it") is can_remove, (
        "in /tmp nobody can remove what is another user's"
    )


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(RUNTIME_FOLDER, str(tmp_path / "no" / "such"))
    with pytest.raises(UnsafeFolder, match="it cannot be made"):
        admin_socket.prepare()


def test_another_user_reaches_neither_the_symlink_nor_the_socket(
    listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_root()
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        os.chmod(parent, 0o755)
        monkeypatch.setenv(RUNTIME_FOLDER, f"{parent}/runtime")
        admin_socket.publish(ADDRESS, listening)
        code = "[attempt('connect', lambda path=path: connect(path)) for path in sys.argv[1:]]"
        said = run_as_nobody(code, str(listening), str(admin_socket.socket_link(ADDRESS)))
    assert said == ["connect EACCES"] * 2
