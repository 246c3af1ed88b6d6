"""The HTTP server as clients see it: the official client, sync and async, streams, errors, probes."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from pdserve import __version__
from pdserve.core.errors import NoWorkerAvailable, QueueFull
from pdserve.core.request import FinishReason
from pdserve.core.status import WorkerState
from pdserve.gateway.app import GatewayServer
from pdserve.gateway.http import answers
from tests.gateway.support import ScriptedCluster

USER: Any = {"role": "user", "content": "hello"}


@pytest.fixture
async def client(server: GatewayServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def chunks(http: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    """Returns the events of a stream; the last one must be the end."""
    response = await http.post(path, json=body | {"stream": True})
    assert (response.status_code, response.headers["content-type"]) == (
        200,
        "text/event-stream; charset=utf-8",
    )
    events = [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def check(model: type[BaseModel], answer: Any) -> Any:
    """Returns the response, which must match its OpenAPI description."""
    model.model_validate(answer)
    return answer


async def test_the_official_client_completes(client: openai.AsyncOpenAI, cluster: ScriptedCluster) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="hello", max_tokens=4, n=2, seed=-1, stop=["zebra"], logprobs=1, temperature=0.5
    )
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, "the quick brown fox", "length"),
        (1, "the quick brown fox", "length"),
    ]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["the", " quick", " brown", " fox"], [0, 3, 9, 15])
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (8, 1)
    sampling = cluster.requests[0].sampling
    assert (sampling.seed, sampling.stop, sampling.temperature, sampling.n) == (2**64 - 1, ("zebra",), 0.5, 2)


async def test_the_official_client_chats(client: openai.AsyncOpenAI, cluster: ScriptedCluster) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
        ],
        max_completion_tokens=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"min_tokens": 1, "ignore_eos": True, "top_k": -1},
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "the quick",
        "length",
    )
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [(item.token, len(item.top_logprobs)) for item in choice.logprobs.content] == [
        ("the", 2),
        (" quick", 2),
    ]
    sampling = cluster.requests[0].sampling
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.top_k, sampling.logprobs) == (1, True, 0, 2)
    assert "hel\nlo" in cluster.tokenizer.decode(cluster.requests[0].prompt_token_ids)


async def test_the_official_client_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=[USER], stream=True, max_tokens=4, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == "the quick brown fox"
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 4
    assert [event.usage for event in events[:-1]] == [None] * len(events[:-1])


async def test_the_synchronous_client_too(server: GatewayServer) -> None:
    def ask() -> list[str]:
        with openai.OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none") as client:
            (model,) = client.models.list().data
            whole = client.completions.create(model=model.id, prompt=[5, 6], max_tokens=2).choices[0].text
            stream = client.completions.create(model=model.id, prompt="hello", max_tokens=2, stream=True)
            return [whole, "".join(event.choices[0].text for event in stream)]

    assert await asyncio.to_thread(ask) == ["the quick", "the quick"]


async def test_errors_are_those_of_the_official_client(
    client: openai.AsyncOpenAI, cluster: ScriptedCluster
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"temperature: -1.0 is not valid") as bad:
        await client.completions.create(model="tiny", prompt="hello", temperature=-1)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here") as unknown:
        await client.chat.completions.create(model="gpt", messages=[USER])
    assert unknown.value.code == "model_not_found"
    assert cluster.requests == []
    cluster.refusal = QueueFull(1024, 1.25)
    with pytest.raises(openai.RateLimitError, match="1024 requests are queued") as full:
        await client.completions.create(model="tiny", prompt="hello", stream=True)
    assert (full.value.response.headers["retry-after"], full.value.response.headers["retry-after-ms"]) == (
        "2",
        "1250",
    )
    cluster.refusal = NoWorkerAvailable("no worker is ready")
    with pytest.raises(openai.InternalServerError, match="no worker is ready") as gone:
        await client.completions.create(model="tiny", prompt="hello")
    assert (gone.value.status_code, gone.value.response.headers["retry-after"]) == (503, "1")


async def test_the_official_client_retries_after_the_stated_delay(
    server: GatewayServer, cluster: ScriptedCluster
) -> None:
    cluster.refusal = QueueFull(1024, 0.01)
    cluster.refuses_once = True
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=1
    ) as client:
        assert (await client.completions.create(model="tiny", prompt="hello", max_tokens=1)).choices[
            0
        ].text == "the"


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.DEADLINE])
async def test_an_error_within_a_stream_is_an_event_of_it(
    client: openai.AsyncOpenAI, cluster: ScriptedCluster, reason: FinishReason
) -> None:
    cluster.ending = (reason, "it went wrong")
    stream = await client.completions.create(model="tiny", prompt="hello", max_tokens=2, stream=True)
    with pytest.raises(openai.APIError, match="it went wrong"):
        async for _ in stream:
            pass


async def test_an_internal_error_reveals_no_details_to_clients(
    http: httpx.AsyncClient, cluster: ScriptedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.refusal = RuntimeError("a secret")  # type: ignore[assignment]
    for stream in (False, True):
        response = await http.post("/v1/completions", json={"prompt": "hello", "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in response.text
    assert "a secret" in caplog.text


async def test_whole_answers_are_as_described(http: httpx.AsyncClient) -> None:
    wanted = {"n": 2, "max_tokens": 3, "return_token_ids": True, "stop_token_ids": [259]}
    body = {"prompt": [[7], [5, 6]], "logprobs": 0} | wanted
    answer = check(answers.Completion, (await http.post("/v1/completions", json=body)).json())
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[7], [7], [5, 6], [5, 6]]
    body = {"messages": [USER], "logprobs": True} | wanted
    chat = check(answers.ChatCompletion, (await http.post("/v1/chat/completions", json=body)).json())
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert [len(choice["token_ids"]) for choice in chat["choices"]] == [3, 3]


async def test_chunks_are_as_described(http: httpx.AsyncClient) -> None:
    wanted = {
        "n": 2,
        "max_tokens": 3,
        "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    body = {"prompt": [[7], [5, 6]], "logprobs": 1} | wanted
    for chunk in await chunks(http, "/v1/completions", **body):
        check(answers.Completion, chunk)
    for chunk in await chunks(
        http, "/v1/chat/completions", messages=[USER], logprobs=True, top_logprobs=1, **wanted
    ):
        check(answers.ChatCompletionChunk, chunk)


async def test_an_assembled_stream_is_the_whole_answer(http: httpx.AsyncClient) -> None:
    body = {
        "prompt": ["hello", "hi"],
        "n": 2,
        "max_tokens": 9,
        "return_token_ids": True,
        "stop": "fox",
        "echo": True,
    }
    whole = (await http.post("/v1/completions", json=body)).json()
    parts = await chunks(http, "/v1/completions", **body)
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [token_id for part in mine for token_id in part["token_ids"]] == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert (
            [part["finish_reason"] for part in mine if part["finish_reason"]]
            == [choice["finish_reason"]]
            == ["stop"]
        )
        assert mine[-1]["stop_reason"] == choice["stop_reason"] == "fox"


async def test_usage_is_in_each_chunk_on_request(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = await chunks(http, "/v1/completions", prompt="hello", max_tokens=4, stream_options=options)
    assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 3, 4, 4, 4]
    assert parts[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_echo_begins_with_the_prompt(http: httpx.AsyncClient) -> None:
    body = {"prompt": ["hello ", "a"], "max_tokens": 1, "echo": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hello the", "athe"]
    ids = (await http.post("/v1/completions", json=body | {"prompt": [259]})).json()
    assert ids["choices"][0]["text"] == "thethe"


async def test_an_echo_with_logprobs_includes_those_of_the_prompt(http: httpx.AsyncClient) -> None:
    body = {"prompt": [[258, 77], [80]], "max_tokens": 1, "echo": True, "logprobs": 1, "n": 2}
    answer = check(answers.Completion, (await http.post("/v1/completions", json=body)).json())
    streamed = [
        check(answers.Completion, chunk)["choices"][0]
        for chunk in await chunks(http, "/v1/completions", **body)
    ]
    for choice in answer["choices"]:
        (part_logprobs,) = (
            part["logprobs"] for part in streamed if part["index"] == choice["index"] and part["logprobs"]
        )
        assert part_logprobs == choice["logprobs"]
    first, _, second, _ = (choice["logprobs"] for choice in answer["choices"])
    assert first["tokens"] == ["he", "l", "the"]
    assert first["token_logprobs"] == [None, -1.0, -0.5]
    assert first["top_logprobs"][0] is None
    assert first["text_offset"] == [0, 2, 3]
    assert second["token_logprobs"] == [None, -0.5]


async def test_metrics_are_those_of_the_cluster(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    response = await http.get("/metrics")
    assert response.content == cluster.metrics()
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_chat_without_a_limit_may_use_all_room(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    await http.post("/v1/chat/completions", json={"messages": [USER]})
    await http.post("/v1/completions", json={"prompt": "hello"})
    await http.post("/v1/completions", json={"prompt": "hello", "max_tokens": None})
    assert [request.sampling.max_tokens for request in cluster.requests] == [200, 16, 16]


async def test_a_request_keeps_its_clients_id(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    response = await http.post("/v1/completions", json={"prompt": "hello"}, headers={"X-Request-Id": "mine"})
    assert (response.headers["x-request-id"], response.json()["id"]) == ("mine", "cmpl-mine")
    several = await http.post(
        "/v1/completions", json={"prompt": ["a", "b"]}, headers={"X-Request-Id": "many"}
    )
    assert several.headers["x-request-id"] == "many"
    assert {request.request_id for request in cluster.requests} == {"mine", "many-0", "many-1"}
    nameless = [
        (await http.post("/v1/completions", json={"prompt": "hello"})).headers["x-request-id"]
        for _ in range(2)
    ]
    assert len(set(nameless)) == 2


async def test_without_keys_a_request_counts_for_its_address_whatever_its_user(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    for extra in ({"user": "alice"}, {}):
        await http.post("/v1/completions", json={"prompt": "hello"} | extra)
    assert [request.client for request in cluster.requests] == ["address:loopback"] * 2
    assert [request.turn for request in cluster.requests] == ["alice", "http:127.0.0.1"]


async def test_fields_without_effect_are_accepted(http: httpx.AsyncClient) -> None:
    nothing = {
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "store": True,
    }
    body = {
        "messages": [USER | {"refusal": None, "tool_calls": None, "name": "x"}],
        "metadata": {"a": "b"},
        "unknown": None,
    }
    assert (await http.post("/v1/chat/completions", json=body | nothing)).status_code == 200


async def test_tokenize_and_detokenize_are_each_others_way_back(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    text = "the dog 🙂 sleeps"
    tokens = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert tokens["tokens"] == list(cluster.tokenizer.encode(text))
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["token_strs"]), 256)
    assert (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json() == {"prompt": text}
    chat = (await http.post("/tokenize", json={"messages": [USER], "add_generation_prompt": False})).json()
    assert cluster.tokenizer.decode(chat["tokens"]) == "<|im_start|>user\nhello<|im_end|>\n"


async def test_probes_report_the_clusters_health(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    async def statuses() -> list[int]:
        return [
            (await http.get(f"/{probe}")).status_code for probe in ("livez", "readyz", "health", "startupz")
        ]

    starting = (await http.get("/startupz")).json()
    assert (starting["phase"], starting["progress"]) == ("starting", 0.75)
    assert starting["workers"]["decode-0"] == {
        "state": "starting",
        "phase": "loading weights",
        "progress": 0.5,
    }
    assert await statuses() == [200, 200, 200, 503]
    ready = tuple(replace(worker, state=WorkerState.READY) for worker in cluster.state.workers)
    cluster.change(workers=ready)
    assert await statuses() == [200, 200, 200, 200]
    cluster.change(workers=(replace(ready[0], stalled_s=31.0), ready[1]))
    assert await statuses() == [200, 200, 503, 200]
    assert (await http.get("/health")).json()["reasons"] == ["prefill-0: no step has ended for 31 s"]
    cluster.change(workers=ready, serving=False)
    assert await statuses() == [200, 503, 503, 200]


async def test_models_and_version_are_reported(http: httpx.AsyncClient) -> None:
    assert check(answers.Models, (await http.get("/v1/models")).json())["data"][0]["id"] == "tiny"
    check(answers.ServedModel, (await http.get("/v1/models/tiny")).json())
    assert (await http.get("/v1/models/gpt")).status_code == 404
    assert (await http.get("/version")).json() == {"version": __version__}
    head = await http.get("/nothing")
    assert (head.status_code, head.json()["error"]["code"]) == (404, "not_found")
    assert (await http.get("/tokenize")).status_code == 405
