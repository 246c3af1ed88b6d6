"""The credentials that commands present to a TLS server, and their messages when these are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdserve.cli import trust
from pdserve.cli.main import app
from tests.certificates import Authority
from tests.cli.conftest import ServerThread
from tests.gateway.conftest import CONFIG


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def guarded(authority: Authority) -> Iterator[ServerThread]:
    """A server that shows a certificate and wants one."""
    mine = authority.sign("server")
    tls = {
        "certificate": str(mine.certificate),
        "key": str(mine.key),
        "client_ca": str(authority.certificate),
    }
    listen = {"grpc": "127.0.0.1:0", "http": None, "tls": tls, "admin_without_key": True}
    server = ServerThread(CONFIG.model_validate(CONFIG.model_dump() | {"listen": listen}))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    trust.use(trust.Trust())


def run(server: ServerThread, *options: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, [*options, "status"], env={"PDSERVE_ADDRESS": server.address, **environment}
    )
    return result.exit_code, result.output


def test_a_command_shows_its_certificate_and_checks_the_servers(
    guarded: ServerThread, authority: Authority
) -> None:
    mine = authority.sign("client")
    options = (
        "--tls-ca",
        str(authority.certificate),
        "--cert",
        str(mine.certificate),
        "--key",
        str(mine.key),
    )
    assert run(guarded, *options)[0] == 0
    environment = {trust.TLS_CA: options[1], trust.TLS_CERT: options[3], trust.TLS_KEY: options[5]}
    assert run(guarded, **environment)[0] == 0


def test_a_command_without_the_right_certificates_says_so(
    guarded: ServerThread, authority: Authority, tmp_path: Path
) -> None:
    code, said = run(guarded, "--tls-ca", str(authority.certificate))
    assert code == 1 and "with TLS and these certificates" in said
    assert run(guarded, "--tls-ca", trust.PUBLIC)[0] == 1
    code, said = run(guarded, "--tls-ca", str(tmp_path / "none"))
    assert code == 1 and "cannot be read: No such file or directory" in said
    code, said = run(guarded, "--tls-ca", "/dev/zero")
    assert code == 1 and "cannot be read: neither a regular file nor a pipe" in said
    code, said = run(guarded, "--tls-ca", "public", "--cert", "/c")
    assert code == 1 and "--cert and --key: got one without the other" in said


def test_a_client_in_clear_is_told_that_the_server_speaks_tls(guarded: ServerThread) -> None:
    result = CliRunner().invoke(app, ["generate", "x", "--address", guarded.address])
    assert result.exit_code == 1
    assert f"{guarded.address} (--address) speaks TLS: name its authority in --tls-ca" in result.stderr
