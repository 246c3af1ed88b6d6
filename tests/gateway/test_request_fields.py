"""The fields of HTTP bodies beside OpenAI's: what is accepted without effect, what does as vLLM does, and how
the rest is refused."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, TypeAlias, get_type_hints

import grpc
import httpx
import openai
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel
from tokenizers import Tokenizer as Backend, normalizers
from transformers import PreTrainedTokenizerFast

from pdserve.core.config import ClusterConfig
from pdserve.core.request import DefaultSampling
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.http.chat_schema import ChatCompletionRequest
from pdserve.gateway.http.schema import CompletionRequest
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import Built, ScriptedCluster, byte_level, model_info

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"
Details: TypeAlias = Callable[[grpc.aio.AioRpcError], dict[str, Any]]
USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"messages": [USER], "max_tokens": 4}
TEXT: dict[str, Any] = {"prompt": "hello", "max_tokens": 4}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body)
    return await http.post(path, content=content, headers={"content-type": "application/json"} | headers)


async def refusal(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await ask(http, body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# without effect

NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "early_stopping": False,
    "include_stop_str_in_output": False,
    "return_tokens_as_token_ids": False,
    "include_reasoning": True,
    "length_penalty": 1.0,
    "prompt_cache_retention": "24h",
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit"},
    "safety_identifier": "a",
    "service_tier": "auto",
    "store": False,
    "priority": 0,
    "guided_decoding_backend": "outlines",
    "prediction": None,
    "anything": None,
    "echo": False,
    "add_special_tokens": False,
    "modalities": ["text"],
    "verbosity": "medium",
    "function_call": "none",
    "functions": [],
    "top_logprobs": 0,
    "audio": None,
}
ONLY_TEXT, ONLY_CHAT = (
    {"best_of"},
    {"modalities", "verbosity", "function_call", "functions", "add_special_tokens", "top_logprobs"},
)


async def test_a_neutral_value_changes_nothing(
    http: httpx.AsyncClient, cluster: ScriptedCluster, subtests: pytest.Subtests
) -> None:
    for body, other in ((TEXT, ONLY_CHAT), (CHAT, ONLY_TEXT)):
        cluster.requests.clear()
        for more in ({}, *({field: value} for field, value in NEUTRAL.items() if field not in other)):
            with subtests.test(body=body, more=more):
                response = await ask(http, body | more, **{"x-request-id": "mine"})
                assert response.status_code == 200, response.text
                assert cluster.requests[-1] == cluster.requests[0]


async def test_parts_of_turns_without_effect_are_accepted(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    cache = {"cache_control": {"type": "ephemeral"}}
    turn = {"role": "assistant", "content": "yes", "refusal": None, "audio": None, "function_call": None}
    more: dict[str, Any] = {"id": "msg_1", "annotations": [], "reasoning_content": "so", "tool_calls": None}
    parts = [{"type": "text", "text": "hi"} | cache]
    for messages in (
        [USER, turn | more | cache, USER],
        [USER | {"content": parts}, {"role": "assistant", "content": "yes"}, USER | cache],
    ):
        assert (await ask(http, {"messages": messages, "max_tokens": 4}, **{"x-request-id": "a"})).is_success
    assert cluster.requests[0].prompt_token_ids == cluster.requests[1].prompt_token_ids
    stream = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert (await ask(http, CHAT | stream)).is_success
    tool = {"type": "function", "function": {"name": "f", "parameters": {}} | cache} | cache
    refused = await refusal(http, CHAT | {"tools": [tool]})
    assert "no place for them" in refused["message"], "of tools in general, as the template has none"


async def test_the_official_client_may_send_them(server: GatewayServer) -> None:
    base_url = f"http://{server.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
            modalities=["text"],
            verbosity="low",
            prediction=None,
            reasoning_effort="low",
            prompt_cache_key="a",
            max_completion_tokens=3,
            extra_body={
                "truncate_prompt_tokens": 100,
                "chat_template_kwargs": {"a": [1]},
                "bad_words": ["x"],
            },
        )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


# values that the official client has a type for, and that are not served here: see docs/protocol.md
OFFICIAL = {
    ChatCompletionRequest: (chat_params, {"audio", "moderation", "prediction", "web_search_options"}),
    CompletionRequest: (text_params, set[str]()),
}


@pytest.mark.parametrize("body", OFFICIAL)
def test_the_fields_of_the_official_client_are_known(body: type[BaseModel]) -> None:
    params, not_served = OFFICIAL[body]
    official = set(get_type_hints(params.CompletionCreateParamsBase)) | {"stream"}
    assert official - set(body.model_fields) == not_served


# unknown fields


async def test_the_refusal_of_an_unknown_field_names_it_and_the_switch(http: httpx.AsyncClient) -> None:
    for body, field in (
        (TEXT | {"temprature": 1}, "temprature"),
        ({"messages": [USER | {"colour": "red"}]}, "messages[0].colour"),
        (TEXT | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ):
        error = await refusal(http, body)
        assert error["param"] == field and error["message"].startswith(f"{field}: ")
        assert "limits.unknown_fields: ignore" in error["message"]


async def test_unknown_fields_are_ignored_where_the_operator_says_so(cluster: ScriptedCluster) -> None:
    settings = CONFIG.model_dump(exclude_unset=True)
    settings["limits"] |= {"unknown_fields": "ignore"}
    config = ClusterConfig.model_validate(settings)
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        large = {"unknown": ["x" * 70_000]}
        for more in ({}, {"temprature": 1, "nested": {"a": [1]}}, large):
            assert (await ask(http, TEXT | more, **{"x-request-id": "mine"})).is_success
        assert cluster.requests[0] == cluster.requests[1] == cluster.requests[2]
        assert (await ask(http, CHAT | {"messages": [USER | {"colour": "red"}]})).is_success
        assert (await refusal(http, TEXT | {"temprature": 1, "use_beam_search": True}))["param"] == (
            "use_beam_search"
        )
        several = await refusal(http, TEXT | {"temperature": "hot", "top_p": 7, "temprature": 1})
        assert [part.partition(":")[0] for part in several["message"].split("; ")] == ["temperature", "top_p"]
    await server.stop(0)


# refusals


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("functions", [{"name": "f"}], "an empty list"),
        ("use_beam_search", True, "false"),
        ("include_reasoning", False, "true"),
    ],
)
async def test_an_expected_value_is_written_as_json(
    http: httpx.AsyncClient, field: str, value: object, expected: str
) -> None:
    message = (await refusal(http, CHAT | {field: value}))["message"]
    assert message.endswith(f"is not valid, expected {expected}")


async def test_more_tokens_than_the_operator_allows_are_no_overflow(http: httpx.AsyncClient) -> None:
    error = await refusal(http, TEXT | {"max_tokens": 1_000_000})  # nor would the model have room for them
    assert (error["code"], error["param"]) == ("invalid_value", "max_tokens")


WRONG = {
    "temperature": 3,
    "top_p": 7,
    "n": "many",
    "temprature": 1,
    "stop": ["", "a"],
    "max_completion_tokens": -1,
    "user": "a\nb",
    "priority": 2000,
    "response_format": {"type": "json_schema"},
}


@pytest.mark.parametrize("body", [TEXT, CHAT], ids=["text", "chat"])
async def test_all_wrong_fields_are_reported_at_once(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    message = (await refusal(http, body | WRONG))["message"]
    named = {problem.partition(":")[0].partition("[")[0].partition(".")[0] for problem in message.split("; ")}
    assert named == set(WRONG)


async def test_what_is_too_much_hides_nothing(http: httpx.AsyncClient) -> None:
    wrong = {"suffix": "x", "stop": ["a"] * 17, "temperature": 3, "top_p": 7, "stop_token_ids": [-1]}
    message = (await refusal(http, TEXT | wrong))["message"]
    assert {part.partition(":")[0].partition("[")[0] for part in message.split("; ")} == set(wrong)


async def test_wrong_values_are_reported_beside_a_wrong_prompt(http: httpx.AsyncClient) -> None:
    values = {"temperature": -1, "top_p": 7}
    for body, prompt in (
        ({"prompt": [5] * 300}, "prompt"),
        ({"prompt": "a b c " * 100}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({}, "prompt"),
        ({"messages": [USER | {"content": "a b c " * 100}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
    ):
        message = (await refusal(http, body | values))["message"]
        named = {problem.partition(":")[0] for problem in message.split("; ")}
        assert named == {"temperature", "top_p", prompt}


async def test_grpc_has_a_violation_for_each_wrong_field(generation: Stub, details: Details) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="hello"), sampling=pb.SamplingParams(temperature=-1, top_p=7, n=0)
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generation.Generate(request)
    violations = details(refused.value)["BadRequest"].field_violations
    assert [violation.field for violation in violations] == ["temperature", "top_p", "n"]


async def test_many_wrong_fields_make_no_long_message(http: httpx.AsyncClient, generation: Stub) -> None:
    names = {f"field{index}": "x" * 100 for index in range(700)}
    error = await refusal(http, TEXT | names)
    assert len(error["message"]) < 1500 and error["message"].startswith("field0: ")


PARAMS: list[tuple[dict[str, Any], str]] = [
    (CHAT | {"model": "gpt"}, "model"),
    (TEXT | {"prompt": [5, 500]}, "prompt[1]"),
    (TEXT | {"prompt": ""}, "prompt"),
    ({"n": 1}, "prompt"),
    ({"messages": [USER | {"content": "a b c " * 100}]}, "messages"),
    ({"messages": [USER, {"role": "system", "content": "a"}]}, "messages"),
    (CHAT | {"max_tokens": 500}, "max_tokens"),
    ({"messages": [USER], "max_completion_tokens": 500}, "max_completion_tokens"),
    (CHAT | {"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    (TEXT | {"echo": True, "logprobs": 50}, "logprobs"),
    (TEXT | {"guided_regex": "((("}, "guided_regex"),
    (TEXT | {"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    (CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
     "response_format"),
    (CHAT | {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (CHAT | {"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    (CHAT | {"documents": [{"a": "b"}]}, "documents"),
    (CHAT | {"user": "x" * 200}, "user"),
    (CHAT | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (TEXT | {"logit_bias": {"600": 1.0}}, "logit_bias"),
    (TEXT | {"stream_options": {}}, "stream_options"),
]  # fmt: skip


async def test_param_is_the_name_that_the_body_has(
    http: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for body, param in PARAMS:
        with subtests.test(param=param, body=body):
            error = (await ask(http, body)).json()["error"]
            assert error["param"] == param and error["message"].startswith(param)
            is_sent = body.get("prompt") == ""
            assert ": ''" not in error["message"] or is_sent, "nothing is shown that was not sent"


async def test_a_body_that_is_no_object_has_a_param(http: httpx.AsyncClient) -> None:
    for content in (b"[]", b"{", b"1", b'"a"', b"null", b""):
        response = await http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "body")


# ids


async def test_a_body_may_name_its_request_unless_the_head_does(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    for body, prefix in ((TEXT, "cmpl-"), (CHAT, "chatcmpl-")):
        answer = await ask(http, body | {"request_id": "mine"})
        assert (answer.json()["id"], answer.headers["x-request-id"]) == (f"{prefix}mine", "mine")
        answer = await ask(http, body | {"request_id": "mine"}, **{"x-request-id": "head"})
        assert (answer.json()["id"], answer.headers["x-request-id"]) == (f"{prefix}head", "head")
        large = await ask(
            http, body | {"request_id": "large", "metadata": None, "stop": None, "x": None} | pad()
        )
        assert large.json()["id"] == f"{prefix}large"
    assert [request.request_id for request in cluster.requests[:2]] == ["mine", "head"]
    for no_header in ("a\nb", "ä", "\u043c", " a", "a b", "x" * 129):
        assert (await refusal(http, TEXT | {"request_id": no_header}))["param"] == "request_id"


def pad() -> dict[str, None]:
    """Returns fields that count as absent, so many that the intake process reads the body."""
    return {f"{'x' * 60}{index}": None for index in range(1200)}


# the model's defaults


async def test_a_silent_request_gets_the_models_defaults(cluster: ScriptedCluster) -> None:
    defaults = DefaultSampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.05)
    info = replace(model_info(cluster.tokenizer), default_sampling=defaults)
    server = await serve(cluster, CONFIG, cluster.tokenizer, info)
    async with (
        httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S) as http,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        generation: Stub = pdserve_pb2_grpc.GenerationStub(channel)
        await ask(http, TEXT | {"top_p": None})
        await generation.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="hello")))
        for request in cluster.requests:
            assert {name: getattr(request.sampling, name) for name in defaults.stated} == defaults.stated
        said = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        await ask(http, TEXT | said)
        sampling = cluster.requests[-1].sampling
        assert {name: getattr(sampling, name) for name in said} == said | {"top_k": 0}
        (model,) = (await http.get("/v1/models")).json()["data"]
        assert model["default_sampling"] == (await http.get("/v1/models/tiny")).json()["default_sampling"]
        assert model["default_sampling"] == defaults.stated
        reported = (await generation.GetModelInfo(pb.GetModelInfoRequest())).default_sampling
        assert {descriptor.name: value for descriptor, value in reported.ListFields()} == defaults.stated
    await server.stop(0)


async def test_a_model_without_defaults_leaves_those_of_the_interface(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    await ask(http, TEXT)
    sampling = cluster.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert (await http.get("/v1/models")).json()["data"][0]["default_sampling"] == {}


# the chat template

SHOWS = (
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"
    "{% for d in documents or [] %}[{{ d.title }}={{ d.text }}]{% endfor %}"
    "think={{ enable_thinking }} effort={{ reasoning_effort }}{% if add_generation_prompt %} go{% endif %}"
)


@pytest.fixture
async def shown(server: GatewayServer) -> AsyncIterator[Callable[..., Any]]:
    """Returns the text that a template makes of a conversation's fields."""
    tokenizer = Built(PreTrainedTokenizerFast(tokenizer_object=byte_level()._backend, chat_template=SHOWS))
    cluster = ScriptedCluster(tokenizer)
    own = await serve(cluster, CONFIG, tokenizer, model_info(byte_level()))

    async def show(body: dict[str, Any]) -> str:
        async with httpx.AsyncClient(
            base_url=f"http://{own.http_address}", trust_env=False, timeout=WAIT_S
        ) as http:
            answer = await ask(http, {"messages": [USER]} | body)
            assert answer.is_success, answer.text
        return tokenizer.decode(cluster.requests[-1].prompt_token_ids)

    yield show
    await own.stop(0)


async def test_variables_of_the_template_come_from_the_body(shown: Callable[..., Any]) -> None:
    assert await shown({}) == "user:|hi;think= effort= go"
    assert (
        await shown({"chat_template_kwargs": {"enable_thinking": False}}) == "user:|hi;think=False effort= go"
    )
    assert await shown({"reasoning_effort": "low"}) == "user:|hi;think= effort=low go"
    both = {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}
    assert await shown(both) == "user:|hi;think= effort=high go", "the more particular one"


async def test_documents_thoughts_and_an_open_turn_reach_the_template(shown: Callable[..., Any]) -> None:
    documents = [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}]
    assert await shown({"documents": documents}) == "user:|hi;[a=b][c=d]think= effort= go"
    turns = [USER, {"role": "assistant", "content": "it is", "reasoning_content": "so"}]
    assert await shown({"messages": turns, "add_generation_prompt": False}) == (
        "user:|hi;assistant:so|it is;think= effort="
    )
    assert await shown({"messages": turns, "continue_final_message": True}) == "user:|hi;assistant:so|it is"


# bad words and truncation


async def test_a_bad_word_is_its_tokens_alone_and_behind_a_space(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    """As in vllm/sampling_params.py: SamplingParams.update_from_tokenizer."""
    words = ["the", " dog", "quick brown", "é", "🙂"]
    await ask(http, TEXT | {"bad_words": words})
    expected: list[tuple[int, ...]] = []
    for word in words:
        for prefix in ("", " "):
            token_ids = byte_level().encode(prefix + word.lstrip(), add_special_tokens=False)
            if not prefix or (token_ids[0] != expected[-1][0] and len(token_ids) == len(expected[-1])):
                expected.append(token_ids)
    assert cluster.requests[0].sampling.bad_words == tuple(expected)


@pytest.mark.parametrize("keep", [1, 9, 255])
async def test_the_end_of_a_truncated_prompt_is_kept(
    http: httpx.AsyncClient, cluster: ScriptedCluster, keep: int
) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 40
    answer = await ask(http, {"prompt": text, "truncate_prompt_tokens": keep, "max_tokens": 1, "echo": True})
    token_ids = byte_level().encode(text)
    assert len(token_ids) > 255
    assert cluster.requests[0].prompt_token_ids == token_ids[-keep:]
    assert answer.json()["usage"]["prompt_tokens"] == keep
    assert text.rstrip().endswith(byte_level().decode(token_ids[-keep:]).rstrip())
    assert answer.json()["choices"][0]["text"].startswith(byte_level().decode(token_ids[-keep:]))


async def test_tokenize_shows_the_truncated_prompt(generation: Stub) -> None:
    prompt = pb.Prompt(text="the quick brown fox " * 40, truncate_tokens=3)
    tokens = await generation.Tokenize(pb.TokenizeRequest(prompt=prompt))
    assert tuple(tokens.token_ids) == byte_level().encode(prompt.text)[-3:]


async def test_tokens_that_are_cut_off_are_not_worked_on(generation: Stub, cluster: ScriptedCluster) -> None:
    """The first ones are in no vocabulary."""
    ids = pb.TokenIds(ids=[2**32 - 1] * 10_000 + [5] * 255)
    prompt, sampling = pb.Prompt(token_ids=ids, truncate_tokens=255), pb.SamplingParams(max_tokens=1)
    await generation.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
    assert cluster.requests[0].prompt_token_ids == (5,) * 255


async def test_a_truncated_prompt_leaves_room_for_the_output_that_nobody_named(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    assert (await ask(http, {"prompt": [5] * 300, "truncate_prompt_tokens": -1})).is_success
    request = cluster.requests[0]
    assert (len(request.prompt_token_ids), request.sampling.max_tokens) == (240, 16)


async def test_a_bad_word_that_the_tokenizer_drops_is_none(cluster: ScriptedCluster) -> None:
    backend = Backend.from_str(byte_level()._backend.to_str())
    backend.normalizer = normalizers.Replace("x", "")
    tokenizer = Built(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=SHOWS))
    server = await serve(cluster, CONFIG, tokenizer, model_info(byte_level()))
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        assert (await ask(http, TEXT | {"bad_words": ["x", "the"]})).is_success
    assert cluster.requests[0].sampling.bad_words[0] == byte_level().encode("the")
    await server.stop(0)
