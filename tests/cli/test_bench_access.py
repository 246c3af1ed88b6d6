"""`pdserve bench` authenticates like other commands: TLS by the options before its name, a key by the
environment."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli import trust
from pdserve.cli.main import app
from pdserve.gateway.auth.keys import make_key, new_key
from tests.certificates import Authority
from tests.cli.conftest import ServerThread
from tests.gateway.conftest import CONFIG

KEY = new_key()
SHORT = (
    "--rate",
    "1000",
    "--requests",
    "2",
    "--prompt-tokens",
    "8",
    "--output-tokens",
    "4",
    "--warm-up",
    "0",
    "--vocab-size",
    "256",
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def guarded(authority: Authority, tmp_path: Path) -> Iterator[ServerThread]:
    """A server that shows a certificate, wants one, and wants a key."""
    mine, keys = authority.sign("server"), tmp_path / "keys"
    keys.write_text(f"{make_key('alice', KEY).line}\n")
    keys.chmod(0o600)
    tls = {
        "certificate": str(mine.certificate),
        "key": str(mine.key),
        "client_ca": str(authority.certificate),
    }
    listen = CONFIG.listen.model_dump() | {"tls": tls, "api_keys": str(keys)}
    server = ServerThread(CONFIG.model_validate(CONFIG.model_dump() | {"listen": listen}))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    trust.use(trust.Trust())


@pytest.fixture
def options(authority: Authority) -> tuple[str, ...]:
    mine = authority.sign("client")
    return "--tls-ca", str(authority.certificate), "--cert", str(mine.certificate), "--key", str(mine.key)


def bench(target: str, *options: str, key: str = KEY) -> Result:
    return CliRunner().invoke(app, [*options, "bench", target, *SHORT], env={trust.API_KEY: key})


def addresses(server: ServerThread) -> tuple[str, str]:
    return server.address, f"https://{server.gateway.http_address}"


def test_both_servers_are_measured_behind_tls_and_keys(
    guarded: ServerThread, options: tuple[str, ...]
) -> None:
    for address in addresses(guarded):
        result = bench(address, *options)
        assert result.exit_code == 0, result.output
        assert "2 requests ended well, 0 failed" in result.stdout
    assert {request.client for request in guarded.cluster.requests} == {"key:alice"}


def test_without_the_key_neither_server_is_measured(guarded: ServerThread, options: tuple[str, ...]) -> None:
    for address in addresses(guarded):
        result = bench(address, *options, key="pdk_other")
        assert result.exit_code == 1
        assert "not a key of this server" in result.stderr


def test_without_the_right_certificates_neither_server_is_measured(
    guarded: ServerThread, options: tuple[str, ...]
) -> None:
    for address in addresses(guarded):
        assert bench(address, *options[:2]).exit_code == 1, "it wants a certificate"
        assert bench(address, "--tls-ca", trust.PUBLIC, *options[2:]).exit_code == 1, (
            "no public authority has signed its own"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--tls-ca", "/nowhere"), "--tls-ca: '/nowhere' cannot be"),
        (("--cert", "/nowhere", "--key", "/nowhere"), "cannot be"),
        (("--cert", "/nowhere"), "--cert and --key: got one without the other"),
    ],
)
@pytest.mark.parametrize("target", ["127.0.0.1:1", "https://127.0.0.1:1"])
def test_files_that_cannot_be_used_are_said_in_one_line(
    target: str, given: tuple[str, ...], message: str
) -> None:
    result = bench(target, *given)
    assert result.exit_code == 1
    assert result.stderr.startswith("pdserve: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
