"""Attempts to get more than a key's rates allow, on real servers in front of a scripted cluster."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.proto import pdserve_pb2 as pb
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB = new_key(), new_key()
CHATS = {"messages": [{"role": "user", "content": "hello"}]}
USED_UP = grpc.StatusCode.RESOURCE_EXHAUSTED
Stub = Any


@pytest.fixture
async def server(
    cluster: ScriptedCluster, tmp_path: Path, standing_rates: None
) -> AsyncIterator[GatewayServer]:
    """Gives alice many requests and few tokens a minute, bob few requests and unlimited tokens."""
    path = tmp_path / "keys"
    path.touch(0o600)
    keys = make_key("alice", ALICE, tokens_per_minute=200), make_key("bob", BOB, requests_per_minute=20)
    path.write_text("".join(f"{key.line}\n" for key in keys))
    settings = CONFIG.model_dump()
    settings["listen"]["api_keys"] = str(path)
    settings["limits"] |= {"max_message_bytes": 4 << 20, "max_n": 16, "max_prompts": 64}
    gateway = await serve(
        cluster, ClusterConfig.model_validate(settings), cluster.tokenizer, model_info(cluster.tokenizer)
    )
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def http(server: GatewayServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as client:
        yield client


@pytest.fixture
def num_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that were tokenised."""
    lengths, encode = list[int](), Tokenizer.encode

    def counted(self: Tokenizer, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    return lengths


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_many_prompts_choices_and_log_probabilities_are_not_one_request(
    http: httpx.AsyncClient, cluster: ScriptedCluster, num_encoded: list[int]
) -> None:
    """64 x 16 are 1,024 requests: bob's full bucket admits them once, and is then in debt for an hour."""
    body = {"prompt": ["hello"] * 64, "n": 16, "best_of": 16, "logprobs": 20, "max_tokens": 1}
    small = {"prompt": "hello", "max_tokens": 1}
    assert (await http.post("/v1/completions", json=small, headers=bearer(BOB))).status_code == 200
    num_encoded.clear()
    refused = await http.post("/v1/completions", json=body, headers=bearer(BOB))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert "requests_per_minute is 20" in refused.json()["error"]["message"]
    assert len(cluster.requests) == 1 and num_encoded == [], "nothing of it ran"
    assert int(refused.headers["retry-after"]) <= 60


async def test_choices_count_as_requests_over_grpc_too(generation: Stub, cluster: ScriptedCluster) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="hello"), sampling=pb.SamplingParams(max_tokens=1, n=16)
    )
    assert await code(generation.Generate(request, metadata=metadata(BOB))) is grpc.StatusCode.OK
    assert await code(generation.Generate(request, metadata=metadata(BOB))) is USED_UP
    assert len(cluster.requests) == 1


async def test_log_probabilities_count_as_tokens(http: httpx.AsyncClient) -> None:
    """A token with 20 alternatives counts as 3: 60 of them do not fit twice into 200."""
    body = {"prompt": "hello", "max_tokens": 60}
    statuses = [
        (await http.post("/v1/completions", json=body | extra, headers=bearer(ALICE))).status_code
        for extra in ({"logprobs": 20}, {"logprobs": 20}, {})
    ]
    assert statuses == [200, 429, 429]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions", "/v1/chat/completions"])
async def test_a_large_text_is_not_tokenised_repeatedly(
    http: httpx.AsyncClient, num_encoded: list[int], path: str
) -> None:
    text = "the dog " * (1 << 14)
    body = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    statuses = [(await http.post(path, json=body, headers=bearer(ALICE))).status_code for _ in range(4)]
    assert sum(length > 1000 for length in num_encoded) <= 1
    assert statuses[2:] == [429, 429] or set(statuses) == {400}  # refused for its length alone


async def test_tokenizing_and_detokenizing_cost_their_tokens(
    generation: Stub, http: httpx.AsyncClient
) -> None:
    ids = list(range(10, 70))
    assert (
        await code(generation.Detokenize(pb.DetokenizeRequest(token_ids=ids), metadata=metadata(ALICE)))
        is grpc.StatusCode.OK
    )
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=ids))
    assert (
        await code(generation.Tokenize(pb.TokenizeRequest(prompt=prompt), metadata=metadata(ALICE)))
        is grpc.StatusCode.OK
    )
    assert (await http.post("/detokenize", json={"tokens": ids}, headers=bearer(ALICE))).status_code == 200
    for refused in (
        generation.Tokenize(pb.TokenizeRequest(prompt=prompt), metadata=metadata(ALICE)),
        generation.Detokenize(pb.DetokenizeRequest(token_ids=ids), metadata=metadata(ALICE)),
    ):
        assert await code(refused) is USED_UP
    assert (
        await http.post("/tokenize", json={"prompt": "x" * 240}, headers=bearer(ALICE))
    ).status_code == 429


async def test_a_request_refused_for_its_content_costs_no_tokens(http: httpx.AsyncClient) -> None:
    for _ in range(4):
        refused = await http.post(
            "/v1/completions",
            json={"prompt": "hello", "model": "x"} | {"max_tokens": 150},
            headers=bearer(ALICE),
        )
        assert refused.status_code == 404
    assert (
        await http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 150}, headers=bearer(ALICE))
    ).status_code == 200


async def test_a_prompt_that_is_refused_once_counted_costs_its_tokens(http: httpx.AsyncClient) -> None:
    long, small = {"prompt": "ab9Z?q" * 16, "max_tokens": 170}, {"prompt": "hello", "max_tokens": 150}
    assert (
        await http.post("/v1/completions", json=long, headers=bearer(ALICE))
    ).status_code == 400  # too long in sum
    assert (await http.post("/v1/completions", json=small, headers=bearer(ALICE))).status_code == 429


@pytest.mark.parametrize("stream", [True, False])
async def test_unproduced_tokens_are_refunded(
    http: httpx.AsyncClient, cluster: ScriptedCluster, stream: bool
) -> None:
    cluster.eos_after = 2
    for _ in range(3):
        body = CHATS | {"max_tokens": 100, "stream": stream}
        assert (await http.post("/v1/chat/completions", json=body, headers=bearer(ALICE))).status_code == 200
