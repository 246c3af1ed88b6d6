"""TLS of the servers: which clients are admitted, which files are refused at start, and the effect of changed
files."""

import asyncio
import logging
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from pdserve.core.config import ClusterConfig
from pdserve.core.config_listen import TlsSection
from pdserve.core.errors import ConfigError
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.tls import ServerTls
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.certificates import Authority, Pair
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

Open = Callable[..., AbstractAsyncContextManager[GatewayServer]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def foreign_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign")


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Pair:
    """A server's files, which a test may change."""
    signed = authority.sign("server")
    copied = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    copied.certificate.write_bytes(signed.certificate.read_bytes())
    copied.key.touch(0o600)
    copied.key.write_bytes(signed.key.read_bytes())
    return copied


@pytest.mark.parametrize(
    ("mode", "is_refused"), [(0o600, False), (0o640, False), (0o644, True), (0o660, True)]
)
def test_a_private_key_that_others_can_read_is_refused(files: Pair, mode: int, is_refused: bool) -> None:
    files.key.chmod(mode)
    if not is_refused:
        ServerTls(section(files))
        return
    with pytest.raises(
        ConfigError, match=r"listen\.tls\.key: .* others cannot read .* of mode 6\d\d \(chmod 600, or 640\)"
    ):
        ServerTls(section(files))


def test_a_private_key_of_another_user_is_refused(files: Pair) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(files.key, 65534, -1)
    with pytest.raises(ConfigError, match="a file that belongs to root, not to uid 65534"):
        ServerTls(section(files))


def test_a_private_key_that_becomes_readable_is_not_reloaded(
    files: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ServerTls(section(files))
    files.key.chmod(0o644)
    assert [tls.current().version for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count("others cannot read") == 1


def section(files: Pair, client_ca: Path | None = None) -> TlsSection:
    return TlsSection(
        certificate=str(files.certificate),
        key=str(files.key),
        client_ca=None if client_ca is None else str(client_ca),
    )


@asynccontextmanager
async def served(
    cluster: ScriptedCluster, tls: TlsSection, local: str | None = None
) -> AsyncIterator[GatewayServer]:
    listen = CONFIG.listen.model_copy(update={"tls": tls})
    config: ClusterConfig = CONFIG.model_copy(update={"listen": listen})
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer), local=local)
    try:
        yield gateway
    finally:
        await gateway.stop(0)


async def answers(channel: grpc.aio.Channel) -> bool:
    async with channel:
        stub = pdserve_pb2_grpc.GenerationStub(channel)
        try:
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=WAIT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
    return bool(info.name == "tiny")


def secure(server: GatewayServer, ca: Authority, mine: Pair | None = None) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(
        ca.certificate.read_bytes(),
        mine.key.read_bytes() if mine else None,
        mine.certificate.read_bytes() if mine else None,
    )
    return grpc.aio.secure_channel(f"localhost:{server.port}", credentials, NO_RETRY)


NO_RETRY = (("grpc.use_local_subchannel_pool", 1),)


async def test_only_clients_that_trust_the_authority_are_served(
    cluster: ScriptedCluster, files: Pair, authority: Authority, foreign_authority: Authority
) -> None:
    async with served(cluster, section(files)) as server:
        assert await answers(secure(server, authority))
        assert not await answers(secure(server, foreign_authority))
        assert not await answers(grpc.aio.insecure_channel(f"localhost:{server.port}"))


async def test_with_client_authorities_only_their_clients_are_served(
    cluster: ScriptedCluster, files: Pair, authority: Authority, foreign_authority: Authority
) -> None:
    async with served(cluster, section(files, authority.certificate)) as server:
        assert await answers(secure(server, authority, authority.sign("client")))
        assert not await answers(secure(server, authority))
        assert not await answers(secure(server, authority, foreign_authority.sign("client")))


async def test_the_launching_process_needs_no_certificate(
    cluster: ScriptedCluster, files: Pair, authority: Authority, tmp_path: Path
) -> None:
    local = f"unix:{tmp_path}/socket"
    async with served(cluster, section(files, authority.certificate), local):
        assert await answers(grpc.aio.insecure_channel(local))


async def test_a_changed_certificate_is_presented_to_the_next_client(
    cluster: ScriptedCluster, files: Pair, authority: Authority, foreign_authority: Authority
) -> None:
    async with served(cluster, section(files)) as server:
        assert await answers(secure(server, authority))
        renewed = foreign_authority.sign("renewed")
        files.certificate.write_bytes(renewed.certificate.read_bytes())
        files.key.write_bytes(renewed.key.read_bytes())
        assert await answers(secure(server, foreign_authority))
        assert not await answers(secure(server, authority))


async def test_a_removed_client_authority_is_no_longer_trusted(
    cluster: ScriptedCluster, files: Pair, authority: Authority, foreign_authority: Authority, tmp_path: Path
) -> None:
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(authority.certificate.read_bytes())
    mine = authority.sign("client")
    async with served(cluster, section(files, client_ca)) as server:
        assert await answers(secure(server, authority, mine))
        client_ca.write_bytes(foreign_authority.certificate.read_bytes())
        assert not await answers(secure(server, authority, mine))


def test_files_that_do_not_match_leave_the_old_ones_in_force(
    files: Pair, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ServerTls(section(files))
    before, other = tls.current(), authority.sign("other")
    files.certificate.write_bytes(other.certificate.read_bytes())
    with caplog.at_level(logging.ERROR):
        assert tls.current() is before
        assert tls.current() is before
    assert len(caplog.records) == 1
    files.key.write_bytes(other.key.read_bytes())
    assert tls.current().certificate == other.certificate.read_bytes()


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_a_file_that_is_missing_is_named(
    files: Pair, authority: Authority, tmp_path: Path, name: str
) -> None:
    tls = section(files, authority.certificate).model_copy(update={name: str(tmp_path / "none")})
    with pytest.raises(
        ConfigError, match=rf"listen\.tls\.{name}: got '.*none', expected a file that can be read"
    ):
        ServerTls(tls)


def test_a_key_of_another_certificate_or_with_a_passphrase_is_refused(
    files: Pair, authority: Authority
) -> None:
    files.key.write_bytes(authority.sign("other").key.read_bytes())
    with pytest.raises(ConfigError, match="expected a PEM certificate that belongs to the private key in"):
        ServerTls(section(files))
    command = [
        "openssl",
        "ec",
        "-in",
        str(files.key),
        "-out",
        str(files.key),
        "-aes256",
        "-passout",
        "pass:x",
    ]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="no passphrase"):
        ServerTls(section(files))


def test_an_invalid_authority_is_refused(files: Pair) -> None:
    with pytest.raises(
        ConfigError, match=r"listen\.tls\.client_ca: got .*, expected PEM certificates of authorities"
    ):
        ServerTls(section(files, client_ca=files.key))


async def test_an_asyncio_server_presents_the_newest_certificate(
    files: Pair, authority: Authority, foreign_authority: Authority
) -> None:
    tls = ServerTls(section(files))
    server = await asyncio.start_server(
        lambda reader, writer: writer.close(), "localhost", 0, ssl=tls.ssl_context()
    )
    port = server.sockets[0].getsockname()[1]

    async def accepts(ca: Authority) -> bool:
        try:
            _, writer = await asyncio.open_connection(
                "localhost", port, ssl=ssl.create_default_context(cafile=str(ca.certificate))
            )
        except ssl.SSLCertVerificationError:
            return False
        writer.close()
        return True

    assert await accepts(authority)
    renewed = foreign_authority.sign("renewed")
    files.certificate.write_bytes(renewed.certificate.read_bytes())
    files.key.write_bytes(renewed.key.read_bytes())
    assert await accepts(foreign_authority)
    assert not await accepts(authority)
    server.close()
    await server.wait_closed()
