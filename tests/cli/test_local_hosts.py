"""Hosts join and leave a running Ray; stubs of `ray` and `ssh` record their calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.cli import local_hosts
from pdserve.cli.client import CommandFailed
from tests.cli.test_supervise import executable


def config(*hosts: str, **provider: str) -> dict[str, Any]:
    """A file, as Ray writes it for the head."""
    return {
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": list(hosts)} | provider,
        "auth": {"ssh_user": "ubuntu", "ssh_private_key": "/key.pem"},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ray", "ssh"):
        executable(tmp_path / "bin" / name, f'echo {name} "$@" >> calls')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(after: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The callback for changes of the file."""
    Path("file").write_text(json.dumps(after))
    Path("copy").write_text(json.dumps(before))
    local_hosts.follow(Path("file"), Path("copy"))
    assert json.loads(Path("copy").read_text()) == after
    return Path("calls").read_text().splitlines() if Path("calls").exists() else []


def test_a_new_host_is_noted_and_nothing_else_happens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(config("a", "b"), config("a")) == ["ray get-worker-ips file"]
    assert capsys.readouterr().out == "b: joins\n"


def test_ray_ends_only_on_the_host_that_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noted, ended = follow(config("a", "c"), config("a", "b", "c"))
    assert noted == "ray get-worker-ips file"
    assert ended.startswith("ssh -tt -i /key.pem ") and ended.endswith(
        "ubuntu@b bash --login -c -i 'source ~/.bashrc; ray stop'"
    )
    assert capsys.readouterr().out == "b: leaves\n"


def test_the_copy_that_ray_reads_stays_until_the_hosts_are_noted(folder: Path) -> None:
    executable(folder / "bin" / "ray", "cat copy > seen; echo no such head >&2; exit 1")
    with pytest.raises(CommandFailed, match="Ray refuses the hosts in file: no such head"):
        follow(config("a"), config("a", "old"))
    assert Path("seen").read_text() == Path("copy").read_text() == json.dumps(config("a", "old"))


def test_a_host_that_is_not_reached_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executable(folder / "bin" / "ssh", "exit 255")
    follow(config(), config("a"))
    assert capsys.readouterr().err == "a: Ray could not be ended there; run `ray stop` on it\n"


def test_a_clouds_hosts_are_left_to_the_cloud(folder: Path) -> None:
    assert follow(config("a", type="aws"), config("b", type="aws")) == []
    assert follow(config("a"), {}) == ["ray get-worker-ips file"]
