"""Ray's folder: no other local user can change the files and sockets that Ray uses, regardless of who started
Ray."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from pdserve.cluster import ray_folder
from pdserve.cluster.actors import WorkerActor
from pdserve.cluster.errors import LaunchError, SharedRayFolder
from pdserve.cluster.launch import _Ray
from pdserve.cluster.ray_folder import ACCEPT, check, weakness_of
from pdserve.worker.spec import WorkerSpec

from ..other_user import NOBODY, needs_root, run_as_nobody
from .test_gpus import spec

pytestmark = pytest.mark.cluster
MAX_SOCKET_PATH_BYTES = 107  # on Linux; the kernel refuses longer ones
MAX_PID_DIGITS = 7
MKDTEMP_CHARS = 8


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that every user can enter and only this one can change."""
    folder = Path(tempfile.mkdtemp(prefix="pdserve-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def made(base: Path, *modes: int) -> Path:
    """Creates nested folders `base`/0/1/... with these modes."""
    folder = base
    for number, mode in enumerate(modes):
        folder = folder / str(number)
        folder.mkdir()
        folder.chmod(mode)
    return folder


@pytest.mark.parametrize(
    ("modes", "weak"),
    [
        ((0o755, 0o755), None),
        ((0o700, 0o777, 0o777), None),  # as we start Ray
        ((0o755, 0o700, 0o777), None),
        ((0o1777, 0o755), None),  # as /tmp
        ((0o777, 0o777, 0o777), "0"),  # as Ray does by default
        ((0o755, 0o777), "0/1"),
        ((0o755, 0o1777), "0/1"),  # others can put files there before Ray does
        ((0o755, 0o775), "0/1"),
        ((0o775, 0o755), "0"),
        ((0o777, 0o700), "0"),  # they put another folder in its place
        ((0o710, 0o777), "0/1"),
        ((0o701, 0o777), "0/1"),
    ],
)
def test_a_folder_is_weak_where_others_can_change_its_path(
    base: Path, modes: tuple[int, ...], weak: str | None
) -> None:
    found = weakness_of(made(base, *modes))
    if weak is None:
        assert found is None
    else:
        assert found is not None and found.startswith(f"{base / weak} has mode")


def test_a_symlink_out_of_a_private_folder_is_followed(base: Path) -> None:
    private, shared = made(base, 0o700), base / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (private / "sockets").symlink_to(shared)
    assert weakness_of(private / "sockets") == f"{shared} has mode 0777"


def test_another_users_folder_is_weak_whatever_its_mode(base: Path) -> None:
    needs_root()
    theirs = made(base, 0o755, 0o700)
    os.chown(theirs.parent, NOBODY, NOBODY)
    assert weakness_of(theirs) == f"{theirs.parent} belongs to the user with id {NOBODY}"
    link = base / "link"
    link.symlink_to(base)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    assert weakness_of(link / "0") == f"{link} belongs to the user with id {NOBODY}"


@pytest.fixture
def shared_session(base: Path) -> Path:
    session = made(base, 0o777)
    for name in ray_folder.WRITTEN:
        (session / name).mkdir()
        (session / name).chmod(0o777)
    return session


def test_the_refusal_names_the_folder_and_the_fix(
    shared_session: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SharedRayFolder) as caught:
        check(shared_session, (), accept=False)
    for part in (
        str(shared_session),
        "has mode 0777",
        "ray stop",
        "RAY_AUTH_MODE=token ray start --head --temp-dir=",
        "ray get-auth-token --generate",
        ACCEPT,
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caplog.records == []
    check(shared_session, (), accept=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(shared_session) in record.getMessage()


def test_a_ray_that_others_can_change_is_not_adopted(
    shared_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _Ray.connect(tmp_path) == _Ray(ours=False), "the tests' own is private"
    monkeypatch.setattr(ray_folder, "session_folder", lambda: shared_session)
    with pytest.raises(LaunchError, match=f"Ray's folder {shared_session} on host"):
        _Ray.connect(tmp_path)
    monkeypatch.setenv(ACCEPT, "1")
    assert _Ray.connect(tmp_path) == _Ray(ours=False)


def test_the_sockets_in_use_are_checked_besides_those_of_the_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ray_folder.sockets()
    assert len(ours) == 2 and all(
        path.is_socket() and path.is_relative_to(ray_folder.session_folder()) for path in ours
    )
    lies_in_another = made(base, 0o777) / "raylet"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(lies_in_another))
        monkeypatch.setattr(ray_folder, "sockets", lambda: (ours[0], lies_in_another))
        with pytest.raises(SharedRayFolder, match=f"{lies_in_another.parent} has mode 0777"):
            _Ray.connect(tmp_path)
    gone = made(base / "0", 0o700) / "raylet"
    base.joinpath("0").chmod(0o755)
    monkeypatch.setattr(ray_folder, "sockets", lambda: (gone, ours[1]))
    with pytest.raises(SharedRayFolder, match=f"{gone} is not a socket"):
        _Ray.connect(tmp_path)


class Recorder:
    """A worker that only notes that it ran."""

    ran: ClassVar[list[WorkerSpec]] = []

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def run(self) -> None:
        Recorder.ran.append(self._spec)


def test_a_worker_refuses_to_run_where_others_can_change_rays_folder(
    shared_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_folder, "session_folder", lambda: shared_session)
    monkeypatch.setattr(Recorder, "ran", [])
    actor = WorkerActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]  # made by ray.remote
    monkeypatch.setattr("pdserve.worker.process.WorkerProcess", Recorder)
    asked = spec("cpu", gpus=1.0)
    with pytest.raises(SharedRayFolder):
        actor(asked).run()
    assert Recorder.ran == []
    actor(replace(asked, accept_open_ray=True)).run()
    assert [run.socket_root for run in Recorder.ran] == [shared_session]


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_cluster_yaml_starts_ray_in_a_private_folder(commands: str, tmp_path: Path) -> None:
    lines = yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text())[commands]
    (start,) = (number for number, line in enumerate(lines) if "ray start" in line)
    assert "--temp-dir=$HOME/.pdserve/ray" in lines[start]
    (close,) = (line for line in lines[:start] if ".pdserve" in line)
    (tmp_path / ".pdserve").mkdir(0o777)
    subprocess.run(["sh", "-c", close], env=os.environ | {"HOME": str(tmp_path)}, check=True)
    assert (tmp_path / ".pdserve").stat().st_mode & 0o777 == 0o700


def read(path: Path) -> bytes:
    """Returns the contents of a file in /proc; empty when the process is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


OF_OUR_OWN = """
import logging, sys
from pathlib import Path
from pdserve.cluster import ray_folder
from pdserve.cluster.launch import _Ray

started = _Ray.connect(Path(sys.argv[1]))
print(ray_folder.session_folder(), flush=True)
sys.stdin.read()
started.disconnect()
"""
ATTACK = """
session, secret = sys.argv[1:]
log = session + "/logs/raylet.out"
attempt("rename log", lambda: os.rename(log, log + ".old"))
attempt("link log", lambda: os.symlink(secret, log))
attempt("rename sockets", lambda: os.rename(session + "/sockets", session + "/theirs"))
attempt("make sockets", lambda: os.mkdir(session + "/sockets"))
attempt("connect", lambda: connect(session + "/sockets/raylet"))
"""
STEPS = ("rename log", "link log", "rename sockets", "make sockets", "connect")


def test_other_users_cannot_reach_our_own_rays_logs_and_sockets(tmp_path: Path) -> None:
    run_folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
    secret = tmp_path / "secret"
    secret.write_text("ours")
    secret.chmod(0o600)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OF_OUR_OWN, str(run_folder)]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None and started.stdin is not None
        session = Path(started.stdout.readline().strip())
        try:
            assert session.is_relative_to(run_folder)
            assert run_folder.stat().st_mode & 0o777 == 0o700 and weakness_of(session / "logs") is None
            spare = MAX_PID_DIGITS - len(session.name.rpartition("_")[2])
            sockets = [len(str(path)) for path in (session / "sockets").iterdir()]
            transfer = len(str(session / ("kv-" + "x" * MKDTEMP_CHARS) / "s"))
            assert len(sockets) == 2 and max(*sockets, transfer) + spare <= MAX_SOCKET_PATH_BYTES
            token = (run_folder / "ray_token").read_bytes()
            assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if token in read(path)], (
                "others read them"
            )
            if os.getuid() == 0:  # otherwise there is no other user to attack
                assert run_as_nobody(ATTACK, str(session), str(secret)) == [
                    f"{step} EACCES" for step in STEPS
                ]
                assert not (session / "logs" / "raylet.out").is_symlink() and secret.read_text() == "ours"
                run_folder.chmod(0o755)
                done = run_as_nobody(ATTACK, str(session), str(secret))
                assert done[:4] == [f"{step} done" for step in STEPS[:4]], "the attack itself works"
                assert weakness_of(session / "logs") == f"{run_folder}/ray has mode 0777"
        finally:
            started.stdin.close()
            started.wait(60)
            shutil.rmtree(run_folder)
