"""The token of a Ray that we start: private, in force, and gone afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.cluster import ray_token
from pdserve.cluster.ray_token import MODE, TOKEN, TOKEN_PATH, RayToken

pytestmark = pytest.mark.cluster

OF_OUR_OWN = """
import logging, os, ray, shutil, subprocess, sys, tempfile
from pathlib import Path
from pdserve.cluster.launch import _Ray

folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
started = _Ray._start(folder, {"namespace": "pdserve", "log_to_driver": False, "logging_level": logging.ERROR})
address = ray.get_runtime_context().gcs_address
join = f"import ray; ray.init(address={address!r}, logging_level=50); print('in')"
without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
guess = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
trying = [
    subprocess.Popen([sys.executable, "-c", join], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for env in (os.environ, without | {"RAY_AUTH_MODE": "disabled"}, without | guess)
]
for process in trying:  # who is refused tries for a while
    print(process.communicate()[0].strip() or "out", flush=True)
started.disconnect()
shutil.rmtree(folder)
"""


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | None]]:
    """The environments that Ray is made to reload. The tests' own Ray keeps its token."""
    seen: list[dict[str, str | None]] = []
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        ray_token, "_refresh", lambda: seen.append({n: os.environ.get(n) for n in (MODE, TOKEN_PATH)})
    )
    return seen


def test_the_token_is_long_and_readable_by_its_user_alone(
    applied: list[dict[str, str | None]], tmp_path: Path
) -> None:
    token = RayToken(tmp_path)
    path = Path(os.environ[TOKEN_PATH])
    assert len(path.read_text()) == 64
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent == tmp_path
    assert applied == [{MODE: "token", TOKEN_PATH: str(path)}]
    token.withdraw()
    token.withdraw()
    assert applied[1:] == [{MODE: None, TOKEN_PATH: None}]


def test_no_two_clusters_have_the_same_token(applied: list[dict[str, str | None]], tmp_path: Path) -> None:
    said = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        token = RayToken(folder)
        said.add(Path(os.environ[TOKEN_PATH]).read_text())
        token.withdraw()
    assert len(said) == 2


@pytest.mark.parametrize("chosen", [{MODE: "disabled"}, {TOKEN: "t"}, {TOKEN_PATH: "/operators"}])
def test_an_operators_choice_of_token_mode_is_kept(
    applied: list[dict[str, str | None]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    chosen: dict[str, str],
) -> None:
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    token = RayToken(tmp_path)
    assert dict(os.environ) == before
    token.withdraw()
    assert dict(os.environ) == before and applied == []


def test_our_own_ray_refuses_clients_without_its_token() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", OF_OUR_OWN], env=env, capture_output=True, text=True, timeout=250
    )
    assert ran.stdout.split() == ["in", "out", "out"], ran.stderr
