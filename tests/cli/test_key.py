"""`pdserve key new`, and the key that commands show."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdserve.cli import trust
from pdserve.cli.main import app
from pdserve.gateway.auth.access import Access, RequiredAccess
from pdserve.gateway.auth.keys import make_key
from tests.cli.conftest import ServerThread
from tests.gateway.conftest import CONFIG


def test_a_new_key_comes_with_the_line_that_lets_it_in() -> None:
    result = CliRunner().invoke(app, ["key", "new", "alice", "--requests-per-minute", "60"])
    key, line = result.stdout.splitlines()
    assert line == make_key("alice", key, requests_per_minute=60).line


def test_a_key_is_marked_for_metrics_and_put_into_a_group() -> None:
    result = CliRunner().invoke(app, ["key", "new", "prom", "--metrics", "--group", "lab"])
    key, line = result.stdout.splitlines()
    assert line == make_key("prom", key, is_scraper=True, group="lab").line
    refused = CliRunner().invoke(app, ["key", "new", "prom", "--group", "a/b"])
    assert refused.exit_code == 1 and "group: not valid" in refused.output


def test_keys_are_added_to_a_file_that_others_may_not_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    shown = [
        CliRunner().invoke(app, ["key", "new", name, "--file", str(file)]).stdout.strip()
        for name in ("alice", "bob")
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    access = Access(str(file))
    assert [
        getattr(access.admit(RequiredAccess.KEY, f"Bearer {key}", 0.0), "name", None) for key in shown
    ] == ["alice", "bob"]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-", "x" * 65, "a\nb"])
def test_a_name_that_the_file_could_not_hold_is_refused(name: str) -> None:
    result = CliRunner().invoke(app, ["key", "new", "--", name])
    assert result.exit_code == 1 and "the name is not valid" in result.output


def test_commands_show_the_key_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = CliRunner().invoke(app, ["key", "new", "root", "--admin", "--file", str(file)]).stdout.strip()
    listen = {"grpc": "127.0.0.1:0", "http": None, "api_keys": str(file)}
    server = ServerThread(CONFIG.model_validate(CONFIG.model_dump() | {"listen": listen}))
    try:
        for command in (["status"], ["generate", "the dog", "--max-tokens", "2"]):
            shown = CliRunner().invoke(
                app, command, env={"PDSERVE_ADDRESS": server.address, trust.API_KEY: key}
            )
            assert shown.exit_code == 0, shown.output
        refused = CliRunner().invoke(
            app, ["generate", "x"], env={"PDSERVE_ADDRESS": server.address, trust.API_KEY: ""}
        )
        assert refused.exit_code == 1 and "expected `Bearer KEY`" in refused.output
    finally:
        server.stop()
        trust.use(trust.Trust(api_key=None))
