"""Administrative commands need no options on the host of the same user's cluster; other users get a message
naming the path tried."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli import trust
from pdserve.cli.main import app
from pdserve.core import admin_socket
from pdserve.gateway.auth.keys import make_key, new_key
from tests.cli.conftest import Run, ServerThread
from tests.gateway.conftest import CONFIG
from tests.gateway.test_admin import config_yaml
from tests.other_user import NOBODY, needs_root

KEY = new_key()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    trust.use(trust.Trust())


def status(address: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["status", "--address", address], env=environment)


def test_every_command_that_administers_works_without_options(
    server: ServerThread, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(config_yaml())
    server.call(server.cluster.go_on.set)
    run("generate", "hello", "--request-id", "mine", "--max-tokens", "2")
    server.stop_when_shut_down()
    for command in (["status"], ["apply", str(file)], ["explain", "mine"], ["drain", "--all"], ["down"]):
        result = run(*command)
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_cluster_is_found_by_its_address(server: ServerThread, host: str) -> None:
    result = status(f"{host}:{server.gateway.port}")
    assert result.exit_code == 0, result.output


def test_without_the_socket_the_error_names_the_attempt_and_the_fix(
    server: ServerThread, runtime_folder: Path, tmp_path: Path
) -> None:
    """Runs as another user, whose runtime folder has no such socket."""
    elsewhere = tmp_path / "elsewhere"
    result = status(server.address, **{admin_socket.RUNTIME_FOLDER: str(elsewhere)})
    assert result.exit_code == 1
    for part in (
        "admin_without_key",
        "asked over TCP without a key; no cluster of this user has its socket at "
        f"{elsewhere}/127.0.0.1_{server.gateway.port}.sock",
        "Run it as the user who started the cluster, or give an admin key in PDSERVE_API_KEY",
    ):
        assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert server.cluster.drained == []


def test_where_nobody_answers_the_way_is_named_too(runtime_folder: Path) -> None:
    result = status("127.0.0.1:1")
    assert result.exit_code == 1
    assert (
        "no pdserve server answers at 127.0.0.1:1" in result.stderr
        and f"{runtime_folder}/127.0.0.1_1.sock" in result.stderr
    )


def test_a_key_that_is_given_is_shown_over_tcp(server: ServerThread) -> None:
    result = status(server.address, **{trust.API_KEY: KEY})
    assert result.exit_code == 1 and f"asked over TCP with the key in {trust.API_KEY})" in result.stderr


def test_a_key_without_admin_is_refused_where_the_user_is_admitted(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{make_key('alice', KEY).line}\n")
    keys.chmod(0o600)
    listen = {"grpc": "127.0.0.1:0", "http": None, "api_keys": str(keys)}
    server = ServerThread(CONFIG.model_validate(CONFIG.model_dump() | {"listen": listen}))
    try:
        assert status(server.address).exit_code == 0
        refused = status(server.address, **{trust.API_KEY: KEY})
        assert refused.exit_code == 1 and "alice: this key may not administer the cluster" in refused.stderr
    finally:
        server.stop()


def test_a_folder_that_somebody_else_made_is_not_used(
    server: ServerThread, runtime_folder: Path, tmp_path: Path
) -> None:
    squatted = tmp_path / "squatted"
    squatted.symlink_to(runtime_folder)
    result = status(server.address, **{admin_socket.RUNTIME_FOLDER: str(squatted)})
    assert (
        result.exit_code == 1
        and admin_socket.RUNTIME_FOLDER in result.stderr
        and str(squatted) in result.stderr
    )
    needs_root()
    os.chown(runtime_folder, NOBODY, NOBODY)
    result = status(server.address)
    assert result.exit_code == 1 and f"belongs to the user with id {NOBODY}" in result.stderr
    os.chown(runtime_folder, 0, 0)
