"""Keys and TLS hold on the HTTP door as they hold on that of gRPC."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from pdserve.core.config_listen import TlsSection
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.keys import make_key, new_key
from tests.certificates import Authority
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB = new_key(), new_key()


@pytest.fixture
async def server(cluster: ScriptedCluster, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    keys = [make_key("alice", ALICE, requests_per_minute=2, tokens_per_minute=150), make_key("bob", BOB)]
    path = tmp_path / "keys"
    path.write_text("".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"api_keys": str(path)})})
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    yield gateway
    await gateway.stop(0)


def official(server: GatewayServer, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key=key, max_retries=0)


async def test_every_path_needs_a_key_but_probes(server: GatewayServer) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
        for path in ("/v1/models", "/v1/models/tiny", "/version", "/metrics", "/openapi.json", "/nothing"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"authorization": f"Bearer {BOB}"})).status_code != 401
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert (await http.post(path, content=b"x" * 200_000)).status_code == 401, "before the body is looked at"
        for path in ("/livez", "/readyz", "/health", "/startupz"):
            assert (await http.get(path)).status_code != 401


async def test_the_official_client_comes_in_by_its_key(server: GatewayServer, cluster: ScriptedCluster) -> None:
    async with official(server, "sk-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError, match="not a key of this server") as refused:
            await stranger.completions.create(model="tiny", prompt="hello")
        assert refused.value.code == "unauthenticated"
    async with official(server, BOB) as bob:
        headers = {"x-request-id": "mine"}
        answer = await bob.completions.create(model="tiny", prompt="hello", user="alice", extra_headers=headers)
    assert answer.id == "cmpl-mine"
    assert (cluster.requests[0].client, cluster.requests[0].request_id) == ("key:bob", "bob/mine")


async def test_a_key_that_has_used_up_its_rate_is_told_when_to_come_back(server: GatewayServer) -> None:
    async with official(server, ALICE) as alice:
        await alice.completions.create(model="tiny", prompt="hello", max_tokens=140)
        with pytest.raises(openai.RateLimitError, match="alice: tokens_per_minute is 150") as much:
            await alice.completions.create(model="tiny", prompt="hello", max_tokens=140)
        assert (much.value.code, "retry-after" in much.value.response.headers) == ("rate_limited", True)
        with pytest.raises(openai.RateLimitError, match="alice: requests_per_minute is 2"):
            await alice.completions.create(model="tiny", prompt="hello", max_tokens=1)


async def test_tls_protects_it_too(cluster: ScriptedCluster, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    tls = TlsSection(certificate=str(pair.certificate), key=str(pair.key))
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"tls": tls})})
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    trusting = ssl.create_default_context(cafile=str(authority.certificate))
    async with httpx.AsyncClient(verify=trusting, trust_env=False) as http:
        assert (await http.get(f"https://{server.http_address}/livez")).status_code == 200
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://{server.http_address}/livez")
    await server.stop(0)
