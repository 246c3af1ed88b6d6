"""Keys and TLS protect the HTTP server as they protect gRPC's."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from pdserve.core.config_listen import TlsSection
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.http.auth_middleware import PROBES
from pdserve.gateway.http.hosts import AllowedHosts
from tests.certificates import Authority
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB, PROMETHEUS, ROOT = (new_key() for _ in range(4))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def server(cluster: ScriptedCluster, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    keys = [
        make_key("alice", ALICE, requests_per_minute=2, tokens_per_minute=150),
        make_key("bob", BOB),
        make_key("prometheus", PROMETHEUS, is_scraper=True),
        make_key("root", ROOT, is_admin=True),
    ]
    path = tmp_path / "keys"
    path.write_text("".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"api_keys": str(path)})})
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    yield gateway
    await gateway.stop(0)


def official(server: GatewayServer, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key=key, max_retries=0)


async def test_every_path_except_probes_needs_a_key(server: GatewayServer) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        for path in ("/v1/models", "/v1/models/tiny", "/version", "/openapi.json", "/nothing"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"authorization": f"Bearer {BOB}"})).status_code != 401
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert (await http.post(path, content=b"x" * 200_000)).status_code == 401, (
                "before the body is looked at"
            )
        for path in PROBES:
            assert (await http.get(path)).status_code != 401


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
async def test_a_probe_without_a_key_is_get_or_head(server: GatewayServer, method: str) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        for path in PROBES:
            assert (await http.request(method, path, content=b"x" * 1000)).status_code == 401
            assert (await http.head(path)).status_code != 401


async def test_metrics_require_a_marked_key(server: GatewayServer, cluster: ScriptedCluster) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        refused = await http.get("/metrics", headers=bearer(BOB))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_permitted")
        assert "bob: this key may not read metrics" in refused.json()["error"]["message"]
        for key in (PROMETHEUS, ROOT):
            assert (await http.get("/metrics", headers=bearer(key))).content == cluster.metrics()


@pytest.mark.parametrize("path", ["/metrics%0a", "/metrics%0A?x", "/metrics/", "//metrics", "/v1/../metrics"])
async def test_no_other_path_leads_an_ordinary_key_to_metrics(server: GatewayServer, path: str) -> None:
    host, _, port = (server.http_address or "").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET {path} HTTP/1.1\r\nhost: a.proxy\r\nauthorization: Bearer {BOB}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_workers_are_named_only_to_clients_with_a_key(
    server: GatewayServer, cluster: ScriptedCluster
) -> None:
    stalled = tuple(replace(worker, stalled_s=31.0) for worker in cluster.state.workers)
    cluster.change(workers=stalled)
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        for headers in ({}, bearer(new_key()), {"authorization": "Basic eA=="}):
            assert (await http.get("/startupz", headers=headers)).json() == {
                "phase": "starting",
                "progress": 0.75,
            }
            for path in PROBES:
                text = (await http.get(path, headers=headers)).text
                assert not any(worker.worker_id in text for worker in stalled), path
        assert (await http.get("/health")).json()["reasons"][0] == "a worker: no step has ended for 31 s"
        assert set((await http.get("/startupz", headers=bearer(BOB))).json()["workers"]) == {
            "prefill-0",
            "decode-0",
        }
        assert "decode-0: no step" in (await http.get("/health", headers=bearer(BOB))).text


async def test_with_keys_any_host_is_accepted(server: GatewayServer) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        assert (await http.get("/livez", headers={"host": "serve.example"})).status_code == 200


async def test_a_page_whose_name_points_to_this_machine_reaches_nothing(cluster: ScriptedCluster) -> None:
    config = CONFIG.model_copy(
        update={"listen": CONFIG.listen.model_copy(update={"allowed_hosts": ("Serve.example",)})}
    )
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        for method, path in (
            ("GET", "/livez"),
            ("GET", "/metrics"),
            ("POST", "/v1/completions"),
            ("OPTIONS", "/tokenize"),
        ):
            refused = await http.request(
                method, path, content=b"x" * 200_000, headers={"host": "evil.example:8000"}
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "unknown_host")
            assert "listen.allowed_hosts" in refused.json()["error"]["message"]
        for host in ("serve.example:80", "localhost:8000", "127.0.0.1", "[::1]:8000"):
            answer = await http.post("/v1/completions", json={"prompt": "hello"}, headers={"host": host})
            assert answer.status_code == 200
    assert len(cluster.requests) == 4
    await server.stop(0)


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("127.0.0.1:8000", True),
        ("10.1.2.3", True),
        ("[::1]", True),
        ("[fe80::1]:8000", True),
        ("LocalHost:8000", True),
        ("localhost.", False),
        ("localhost.evil.example", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("a.b:80", True),
        ("a.b:80:80", False),
        ("a.b:x", False),
        ("[a.b]", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_a_host_is_an_address_localhost_or_listed(host: str, is_allowed: bool) -> None:
    assert (host in AllowedHosts(["A.b"])) is is_allowed


async def test_the_official_client_is_admitted_by_its_key(
    server: GatewayServer, cluster: ScriptedCluster
) -> None:
    async with official(server, "sk-wrong") as unauthenticated:
        with pytest.raises(openai.AuthenticationError, match="not a key of this server") as refused:
            await unauthenticated.completions.create(model="tiny", prompt="hello")
        assert refused.value.code == "unauthenticated"
    async with official(server, BOB) as bob:
        headers = {"x-request-id": "mine"}
        answer = await bob.completions.create(
            model="tiny", prompt="hello", user="alice", extra_headers=headers
        )
    assert answer.id == "cmpl-mine"
    assert (cluster.requests[0].client, cluster.requests[0].request_id) == ("key:bob", "bob/mine")


@pytest.mark.usefixtures("standing_rates")
async def test_an_exhausted_key_is_informed_when_to_retry(server: GatewayServer) -> None:
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
    async with httpx.AsyncClient(verify=trusting, trust_env=False, timeout=WAIT_S) as http:
        assert (await http.get(f"https://{server.http_address}/livez")).status_code == 200
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://{server.http_address}/livez")
    await server.stop(0)
