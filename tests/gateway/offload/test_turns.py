"""No client's request keeps the loop busy for long in one turn; `turns` explains what is counted, and how."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import grpc
import httpx
import pytest
import pytest_asyncio
from hypothesis import given, settings, strategies as st

from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.http.chat_schema import ChatCompletionRequest
from pdserve.gateway.http.schema import CompletionRequest
from pdserve.gateway.in_turns import in_turns
from pdserve.gateway.offload import offload as head
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.offload.hostile import CONTEXT, GRPC, HTTP, TOOLS
from tests.gateway.offload.turns import Counts, metered
from tests.gateway.support import ScriptedCluster, byte_level, model_info
from tests.gateway.tools.models import eos_of, qwen

MOST = Counts(lines=20_000, blocks=300_000, bytes_parsed=1 << 16, chars_encoded=4096, ids_decoded=4096)
CONFIG = ClusterConfig.model_validate(
    {"listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}, "model": {"path": "tiny"}}
)


on_the_servers_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[GatewayServer]:
    cluster = ScriptedCluster(byte_level())
    gateway = await serve(
        cluster, CONFIG, cluster.tokenizer, replace(model_info(cluster.tokenizer), max_model_len=CONTEXT)
    )
    yield gateway
    await gateway.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server_with_tools() -> AsyncIterator[GatewayServer]:
    cluster = ScriptedCluster(qwen())
    info = replace(model_info(qwen()), max_model_len=CONTEXT, eos_token_ids=(eos_of(qwen()),))
    gateway = await serve(cluster, CONFIG, cluster.tokenizer, info)
    yield gateway
    await gateway.stop(0)


@on_the_servers_loop
@pytest.mark.parametrize("name", HTTP)
async def test_no_body_stalls_the_loop(
    server: GatewayServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_http(server, *HTTP[name](), monkeypatch)


@on_the_servers_loop
@pytest.mark.parametrize("name", TOOLS)
async def test_no_tools_stall_the_loop(
    server_with_tools: GatewayServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_http(server_with_tools, *TOOLS[name](), monkeypatch)


async def check_http(server: GatewayServer, path: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    url, headers = f"http://{server.http_address}{path}", {"content-type": "application/json"}

    def ask() -> httpx.Response:
        with httpx.Client(verify=False, trust_env=False, timeout=300) as client:
            return client.post(url, content=body, headers=headers)

    with metered(monkeypatch) as meter:
        response = await asyncio.to_thread(ask)
    assert response.status_code in (200, 400), response.text
    assert meter.most.excess(MOST) == {}


@on_the_servers_loop
@pytest.mark.parametrize("name", GRPC)
async def test_no_message_stalls_the_loop(
    server: GatewayServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = GRPC[name]()

    def ask() -> str:
        with grpc.insecure_channel(
            f"127.0.0.1:{server.port}", options=[("grpc.max_receive_message_length", -1)]
        ) as channel:
            try:
                channel.unary_unary(f"/pdserve.v1.Generation/{method}", bytes, bytes)(data, timeout=300)
            except grpc.RpcError as error:
                return error.code().name + str(error.details())[:150]
            return "OK"

    with metered(monkeypatch) as meter:
        code = await asyncio.to_thread(ask)
    assert code.startswith(("OK", "INVALID_ARGUMENT", "NOT_FOUND"))
    assert meter.most.excess(MOST) == {}


USER = '{"role":"user","content":"a"}'
TOOL = '{"type":"function","function":{"name":"f"}}'
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
SHAPES = ["1", '"a"', "[]", "{}", '"\\u0000"', '{"a":[]}', USER, TOOL]
FIELDS = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, "tokens"})


class Fuzzed:
    """A server on a separate loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        cluster = ScriptedCluster(byte_level())
        info = replace(model_info(cluster.tokenizer), max_model_len=CONTEXT)
        self.server = self.loop.run_until_complete(serve(cluster, CONFIG, cluster.tokenizer, info))
        # an endpoint's first request has FastAPI read its source code, a third of what a turn may do
        for path in PATHS:
            url = f"http://{self.server.http_address}{path}"
            self.loop.run_until_complete(asyncio.to_thread(httpx.post, url, content=b"{}", trust_env=False))

    def stop(self) -> None:
        self.loop.run_until_complete(self.server.stop(0))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    fuzzed = Fuzzed()
    yield fuzzed
    fuzzed.stop()


@given(
    path=st.sampled_from(PATHS),
    field=st.sampled_from(FIELDS),
    shape=st.sampled_from(SHAPES),
    is_object=st.booleans(),
    levels=st.integers(0, 100),
    num_bytes=st.sampled_from([30_000, 65_000, 66_000, 700_000]),
)
@settings(max_examples=25, deadline=None)
def test_no_field_full_of_values_stalls_the_loop(
    fuzzed: Fuzzed, path: str, field: str, shape: str, is_object: bool, levels: int, num_bytes: int
) -> None:
    items = (
        f'"{i}":{shape}' if is_object else shape for i in range(num_bytes // (len(shape) + 6 * is_object + 1))
    )
    opening, closing = "{}" if is_object else "[]"
    inside = opening + ",".join(items) + closing
    good = {"prompt": '"prompt":"a"', "messages": f'"messages":[{USER}]', "tokens": '"tokens":[1]'}
    needed = good[{"/v1/chat/completions": "messages", "/detokenize": "tokens"}.get(path, "prompt")]
    limit = '"max_tokens":1,' if path.startswith("/v1") and field != "max_tokens" else ""
    body = "{" + f'{limit}{needed},"{field}":' + "[" * levels + inside + "]" * levels + "}"
    with pytest.MonkeyPatch.context() as patch:
        fuzzed.loop.run_until_complete(check_http(fuzzed.server, path, body.encode(), patch))


BUSY: dict[str, Callable[[], object]] = {
    "lines": lambda: [index for index in range(MOST.lines) if index],
    "blocks": lambda: json.loads("[" + "{}," * 2 * MOST.blocks + "{}]"),
    "bytes_parsed": lambda: vars(head)["parsed"](
        pb.GenerateRequest, pb.GenerateRequest(model="a" * MOST.bytes_parsed).SerializeToString()
    ),
    "chars_encoded": lambda: byte_level().encode("a" * (MOST.chars_encoded + 1)),
    "ids_decoded": lambda: byte_level().decode([70] * (MOST.ids_decoded + 1)),
}


@pytest.mark.parametrize("kind", BUSY)
async def test_a_turn_that_does_too_much_is_detected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    with metered(monkeypatch) as meter:
        asyncio.get_running_loop().call_soon(lambda: kept.append(BUSY[kind]()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert kind in meter.most.excess(MOST)


async def test_turns_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with metered(monkeypatch) as meter:
        async for _ in in_turns(range(10 * MOST.lines)):
            pass
    assert meter.most.excess(MOST) == {}
