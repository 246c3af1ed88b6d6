"""Browsers and probes: CORS, HEAD, compressed bodies, the index and the documentation."""

import asyncio
import gzip
import json
import re
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import serve
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.http.codings import SLICE_BYTES, Decoder, accepts_gzip
from pdserve.gateway.http.pages import Pages
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

PAGE = "https://app.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}
BODY = json.dumps({"prompt": "hello", "max_tokens": 4}).encode()
JSON = {"content-type": "application/json"}
Connect = Callable[..., Any]


@pytest.fixture
async def connect(cluster: ScriptedCluster) -> AsyncIterator[Connect]:
    """Returns clients of servers with further settings in `listen` and `limits`."""
    opened: list[Any] = []

    async def open_one(listen: dict[str, Any], **limits: Any) -> httpx.AsyncClient:
        settings = CONFIG.model_dump(exclude_unset=True)
        settings["listen"] |= listen
        settings["limits"] |= limits
        config = ClusterConfig.model_validate(settings)
        server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
        client = httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S)
        opened.append((server, client))
        return client

    yield open_one
    for server, client in opened:
        await client.aclose()
        await server.stop(0)


# pages of other origins


async def test_pages_of_other_origins_are_kept_out_by_default(http: httpx.AsyncClient) -> None:
    preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
    answer = await http.get("/v1/models", headers={"origin": PAGE})
    assert preflight.status_code == 405
    for response in (preflight, answer):
        assert not any(name.startswith("access-control") for name in response.headers)


async def test_a_listed_page_may_ask_and_read_also_refusals(connect: Connect) -> None:
    http = await connect({"cors_origins": [PAGE]})
    preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    answer = await http.post("/v1/completions", content=BODY, headers=JSON | {"origin": PAGE})
    refusal = await http.post("/v1/completions", content=b"{}", headers=JSON | {"origin": PAGE})
    async with http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "stream": True}, headers={"origin": PAGE}
    ) as stream:
        streamed = stream
    for response, status in ((answer, 200), (refusal, 400), (streamed, 200)):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "origin" in response.headers["vary"]
        assert "x-request-id" in response.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.evil", "null", f"{PAGE}:444"]
)
async def test_an_unlisted_page_gets_no_permission(connect: Connect, origin: str) -> None:
    http = await connect({"cors_origins": [PAGE]})
    preflight = await http.options("/v1/completions", headers=PREFLIGHT | {"origin": origin})
    answer = await http.get("/v1/models", headers={"origin": origin})
    assert preflight.status_code == 405
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["vary"] == "origin", "or a cache would give it to a listed page"


async def test_a_star_permits_every_page(connect: Connect) -> None:
    http = await connect({"cors_origins": ["*"]})
    preflight = await http.options("/v1/completions", headers=PREFLIGHT)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "*")
    assert "access-control-allow-origin" not in (await http.get("/v1/models")).headers, "it names no origin"


async def test_a_page_may_reach_a_private_network_only_if_it_is_listed(connect: Connect) -> None:
    http = await connect({"cors_origins": [PAGE]})
    asks = PREFLIGHT | {"access-control-request-private-network": "true"}
    permitted = await http.options("/v1/completions", headers=asks)
    assert permitted.headers["access-control-allow-private-network"] == "true"
    refused = await http.options("/v1/completions", headers=asks | {"origin": "https://evil.example"})
    assert "access-control-allow-private-network" not in refused.headers


async def test_a_listed_page_does_not_reach_a_server_by_a_foreign_name(connect: Connect) -> None:
    http = await connect({"cors_origins": ["*"]})
    for method, headers in (("OPTIONS", PREFLIGHT), ("GET", {"origin": PAGE})):
        refused = await http.request(method, "/v1/models", headers=headers | {"host": "evil.example"})
        assert refused.status_code == 421
        assert "access-control-allow-origin" not in refused.headers


async def test_permission_is_no_key(connect: Connect, tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys"
    keys.write_text(f"{make_key('alice', key).line}\n")
    keys.chmod(0o600)
    http = await connect({"cors_origins": [PAGE], "api_keys": str(keys)})
    assert (await http.options("/v1/completions", headers=PREFLIGHT)).status_code == 204, "browsers send none"
    assert (await http.options("/v1/completions", headers={"origin": PAGE})).status_code == 401
    refused = await http.post("/v1/completions", content=BODY, headers=JSON | {"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    shown = {"origin": PAGE, "authorization": f"Bearer {key}"}
    assert (await http.post("/v1/completions", content=BODY, headers=JSON | shown)).status_code == 200


# HEAD


async def test_head_is_where_get_is(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    readable = [path for path, operations in paths.items() if "get" in operations]
    assert {"/v1/models", "/metrics", "/health"} <= set(readable)
    for path in (*readable, "/", "/docs", "/openapi.json"):
        path = path.replace("{model}", "tiny")
        read, head = await http.get(path), await http.head(path)
        assert (head.status_code, head.content) == (read.status_code, b""), path
        assert head.headers["content-type"] == read.headers["content-type"], path
    assert (await http.head("/v1/completions")).status_code == 405


# compressed requests


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


ENCODED = {
    "gzip": gzip.compress(BODY),
    "X-Gzip": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "deflate ": raw_deflate(BODY),
    "identity": BODY,
}


@pytest.mark.parametrize("coding", ENCODED)
async def test_a_compressed_body_is_the_same_request(
    http: httpx.AsyncClient, cluster: ScriptedCluster, coding: str
) -> None:
    headers = JSON | {"content-encoding": coding.strip(), "x-request-id": "mine"}
    assert (
        await http.post("/v1/completions", content=BODY, headers=JSON | {"x-request-id": "mine"})
    ).is_success
    assert (await http.post("/v1/completions", content=ENCODED[coding], headers=headers)).is_success
    assert cluster.requests[0] == cluster.requests[1]


async def test_a_compressed_body_may_come_in_any_parts(http: httpx.AsyncClient) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for byte in zlib.compress(BODY):
            yield bytes([byte])

    headers = JSON | {"content-encoding": "deflate"}
    assert (await http.post("/v1/completions", content=parts(), headers=headers)).is_success


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "\u00fc"])
async def test_another_coding_is_refused_by_its_name(http: httpx.AsyncClient, coding: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-encoding", coding.encode("latin-1"))]
    refused = await http.post("/v1/completions", content=b"x" * 1000, headers=headers)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (415, "unsupported_encoding")
    assert repr(coding) in error["message"] and "gzip, deflate" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        BODY,
        gzip.compress(BODY)[:-1],
        gzip.compress(BODY)[:10],
        gzip.compress(BODY) + b"x",
        gzip.compress(BODY) * 2,
        b"\x1f\x8b" * 1000,
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_broken_coding_is_refused(http: httpx.AsyncClient, coding: str, body: bytes) -> None:
    refused = await http.post("/v1/completions", content=body, headers=JSON | {"content-encoding": coding})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_encoding")
    assert (await http.post("/v1/completions", content=BODY, headers=JSON)).is_success


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
async def test_a_bomb_is_refused_at_the_size_of_any_body(
    http: httpx.AsyncClient, compress: Callable[[bytes], bytes]
) -> None:
    bomb = compress(b" " * 80_000_000)
    assert len(bomb) < 100_000, "its own size is no reason"
    coding = "gzip" if compress is gzip.compress else "deflate"
    tracemalloc.start()
    refused = await http.post("/v1/completions", content=bomb, headers=JSON | {"content-encoding": coding})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert peak < 8_000_000


def test_a_bomb_is_decoded_in_slices() -> None:
    sizes = [len(piece) for piece in Decoder(b"gzip").feed(gzip.compress(b" " * 10_000_000))]
    assert sum(sizes) == 10_000_000 and max(sizes) <= SLICE_BYTES


async def test_decoded_bytes_count_for_what_a_client_holds(
    connect: Connect, cluster: ScriptedCluster
) -> None:
    http = await connect({}, max_message_bytes=1 << 17, max_held_bytes=1 << 20)  # 1 << 17 for one client
    body = gzip.compress(json.dumps({"prompt": "hello", "max_tokens": 4}).encode() + b" " * 100_000)
    headers = JSON | {"content-encoding": "gzip"}
    cluster.hold_after = 1
    held = asyncio.create_task(http.post("/v1/completions", content=body, headers=headers))
    await cluster.held.wait()
    refused = await http.post("/v1/completions", content=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_bytes")
    cluster.say_on.set()
    assert (await held).is_success
    assert (await http.post("/v1/completions", content=body, headers=headers)).is_success, "all is given back"


# compressed answers

LARGE = {"prompt": "hello", "max_tokens": 100, "logprobs": 5}


async def test_large_json_is_compressed_on_request_and_the_same(http: httpx.AsyncClient) -> None:
    ask = LARGE | {"request_id": "mine"}
    plain = await http.post("/v1/completions", json=ask, headers={"accept-encoding": "identity"})
    packed = await http.post("/v1/completions", json=ask, headers={"accept-encoding": "br, gzip;q=0.5"})
    assert "content-encoding" not in plain.headers and "accept-encoding" in plain.headers["vary"]
    assert packed.headers["content-encoding"] == "gzip" and "accept-encoding" in packed.headers["vary"]
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert packed.json() | {"created": 0} == plain.json() | {"created": 0}


async def test_streams_and_small_answers_are_never_compressed(http: httpx.AsyncClient) -> None:
    headers = {"accept-encoding": "gzip"}
    stream = await http.post("/v1/completions", json=LARGE | {"stream": True}, headers=headers)
    small = await http.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    assert len(stream.content) > 4096
    for response in (stream, small):
        assert "content-encoding" not in response.headers


@pytest.mark.parametrize(
    ("header", "accepts"),
    [
        ("gzip", True),
        ("deflate, GZIP", True),
        ("gzip;q=0.001", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0", False),
        ("br", False),
        ("identity", False),
        ("", False),
        ("gzippy", False),
    ],
)
def test_a_client_says_whether_it_takes_gzip(header: str, accepts: bool) -> None:
    assert accepts_gzip([(b"accept-encoding", header.encode())]) is accepts


# pages


async def test_the_index_is_one_line(http: httpx.AsyncClient) -> None:
    index = await http.get("/")
    assert index.headers["content-type"].startswith("text/plain")
    assert index.text.count("\n") == 1 and "tiny" in index.text and "/docs" in index.text


async def test_the_documentation_needs_no_network_and_runs_nothing(http: httpx.AsyncClient) -> None:
    docs = await http.get("/docs")
    assert docs.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|@import|url\(|(src|href)=.(?!#|/openapi)", docs.text)
    description = (await http.get("/openapi.json")).json()
    for path, operations in description["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in docs.text
    for field in description["components"]["schemas"]["ChatCompletionRequest"]["properties"]:
        assert f"<code>{field}</code>" in docs.text
    assert "&lt;" in docs.text or "<tool_call>" not in docs.text


async def test_the_documentation_is_made_once_and_beside_the_loop() -> None:
    makers = []

    def describe() -> dict[str, Any]:
        makers.append(threading.current_thread())
        return {"info": {"title": "a", "version": "1"}, "paths": {}, "components": {"schemas": {}}}

    pages = Pages("tiny", describe)
    request = Request({"type": "http"})
    gone = asyncio.ensure_future(pages.docs(request))
    await asyncio.sleep(0)
    gone.cancel()  # a client that does not wait takes nothing from the others
    await asyncio.gather(pages.docs(request), pages.openapi(request))
    assert len(makers) == 1 and makers[0] is not threading.main_thread()


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/embeddings", None),
        ("/v1/" + "x" * 4000, None),
    ],
)
async def test_a_path_without_its_version_is_recognised(
    http: httpx.AsyncClient, path: str, meant: str | None
) -> None:
    error = (await http.post(path, content=BODY, headers=JSON)).json()["error"]
    hint = f"; did you mean {meant}?" if meant else ""
    assert (error["code"], error["message"]) == ("not_found", f"there is no {path}{hint}")


async def test_where_there_are_keys_pages_need_one(connect: Connect, tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys"
    keys.write_text(f"{make_key('alice', key).line}\n")
    keys.chmod(0o600)
    http = await connect({"api_keys": str(keys)})
    for path in ("/", "/docs", "/openapi.json"):
        assert (await http.get(path)).status_code == (await http.head(path)).status_code == 401
        assert (await http.get(path, headers={"authorization": f"Bearer {key}"})).status_code == 200
