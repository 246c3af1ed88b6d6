"""Which server a command talks to, and what it says when none answers there."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli.main import app
from tests.cli.conftest import Run, ServerThread
from tests.other_user import NOBODY, needs_root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without a file and with nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PDSERVE_ADDRESS", raising=False)
    return tmp_path


@pytest.fixture
def http_port() -> Iterator[int]:
    """The port of a server that speaks HTTP only."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def call(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


def words(result: Result) -> str:
    """Returns what was printed, without the frame and the line ends that the terminal's width makes."""
    return " ".join(result.output.replace("│", " ").split())


def write(folder: Path, listen: str) -> None:
    (folder / "cluster.yaml").write_text(f"metadata:\n  pdserve:\n    listen: {{{listen}}}\n    other: 1\n")


def test_the_port_in_the_file_is_found_without_options(folder: Path, server: ServerThread) -> None:
    write(folder, f"grpc: '0.0.0.0:{server.gateway.port}', allow_insecure: true")
    assert call("status").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "file", "named"),
    [
        (["--address", "localhost:1"], {"PDSERVE_ADDRESS": "x:3"}, "grpc: 2", "localhost:1 (--address)"),
        ([], {"PDSERVE_ADDRESS": "127.0.0.1:3"}, "grpc: 2", "127.0.0.1:3 (PDSERVE_ADDRESS)"),
        ([], {}, "grpc: '127.0.0.1:2'", "127.0.0.1:2 (listen.grpc in ./cluster.yaml)"),
        ([], {}, "grpc: 2", "127.0.0.1:2 (listen.grpc in ./cluster.yaml)"),
        (["--address", "4"], {}, "grpc: 2", "127.0.0.1:4 (--address)"),
    ],
)
def test_the_first_that_names_an_address_wins_and_is_said(
    folder: Path, arguments: list[str], environment: dict[str, str], file: str, named: str
) -> None:
    write(folder, file)
    result = call("status", *arguments, **environment)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"pdserve: no pdserve server answers at {named}; start one")


@pytest.mark.parametrize(
    "text", ["- what", "metadata: {pdserve: {listen: 5}}", "metadata: {pdserve: {}}", "{"]
)
def test_a_file_that_names_none_leaves_the_default(folder: Path, text: str) -> None:
    from pdserve.cli.address import DEFAULT_ADDRESS, _from_file

    (folder / "cluster.yaml").write_text(text)
    assert _from_file() == (DEFAULT_ADDRESS, "the default, as ./cluster.yaml names no other")


@pytest.mark.parametrize(
    ("address", "hint"),
    [("localhost", "localhost:50051?"), ("http://localhost:8000", "not a URL"), ("a:70000", "HOST:PORT")],
)
def test_an_address_of_another_form_is_refused_with_a_hint(address: str, hint: str) -> None:
    result = call("status", "--address", address, COLUMNS="300")
    assert result.exit_code == 2
    assert hint in result.stderr


def test_the_port_of_an_http_server_is_recognised(folder: Path, http_port: int) -> None:
    result = call("status", "--address", f"127.0.0.1:{http_port}")
    assert result.exit_code == 1
    assert f"an HTTP server answers at 127.0.0.1:{http_port} (--address), expected the gRPC" in result.stderr


def test_down_fails_where_nothing_was_stopped(folder: Path) -> None:
    result = call("down", "--address", "127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pdserve: no pdserve server answers at 127.0.0.1:1")


def test_chat_notices_before_it_asks_that_nobody_answers(folder: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "--address", "127.0.0.1:1"], input="hello\n")
    assert (result.exit_code, result.stdout) == (1, "")


def test_the_last_request_is_explained_without_its_id(run: Run) -> None:
    assert run("explain", "--last").stderr.endswith("`pdserve generate` has sent no request yet\n")
    shown = run("generate", "hello", "--max-tokens", "2", "--verbose").stderr
    explained = run("explain", "--last")
    assert explained.exit_code == 0
    assert shown.removeprefix("request ").strip() in explained.stdout


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("ps", "status"),
        ("version", "--version"),
        ("top", "status -w"),
        ("generat", "generate"),
        ("stop", "down"),
    ],
)
def test_an_unknown_command_names_the_one_that_is_meant(command: str, meant: str) -> None:
    result = call(command, COLUMNS="200")
    assert result.exit_code == 2
    assert f"no such command: {command}; did you mean: pdserve {meant}?" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "up",
        "generate",
        "chat",
        "status",
        "explain",
        "requests",
        "logs",
        "apply",
        "drain",
        "down",
        "plan",
        "bench",
        "key",
        "key new",
        "simulate",
        "supervise",
        "validate",
    ],
)
def test_help_fits_80_columns(command: str) -> None:
    result = call(*command.split(), "--help", COLUMNS="80")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout, "names and help are whole"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered_for_a_shell(shell: str) -> None:
    result = CliRunner().invoke(app, [], prog_name="pdserve", env={"_PDSERVE_COMPLETE": f"source_{shell}"})
    assert "pdserve" in result.stdout, result.output
    assert result.exit_code == 0


@pytest.mark.parametrize("name", ["cluster.yaml", "."])
def test_a_file_that_another_user_can_write_names_no_server(folder: Path, name: str) -> None:
    needs_root()
    write(folder, "grpc: '127.0.0.1:2'")
    os.chown(folder / name, NOBODY, NOBODY)
    result = call("status")
    assert result.exit_code == 2
    assert "can be written by another user" in words(result) and "--address" in words(result)
    assert "127.0.0.1:1" in call("status", "--address", "127.0.0.1:1").output


@pytest.mark.parametrize(("name", "mode"), [("cluster.yaml", 0o666), (".", 0o777)])
def test_a_file_that_everybody_can_write_names_no_server(folder: Path, name: str, mode: int) -> None:
    write(folder, "grpc: '127.0.0.1:2'")
    (folder / name).chmod(mode)
    assert "can be written by another user" in words(call("status"))
