"""Tools on both servers: the same requests are refused and accepted, with the same words."""

import json
from typing import Any, TypeAlias

import httpx
import pytest

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.both_apis import check_same, over_grpc, over_http
from tests.gateway.support import ScriptedCluster
from tests.gateway.tools.asking import USER, ask, named, tool
from tests.gateway.tools.models import openai_tools

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"


def talk(**message: Any) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    """Returns a conversation with a message of the assistant."""
    calls = [
        pb.ToolCall(
            id=call.get("id", ""), name=call["function"]["name"], arguments=call["function"]["arguments"]
        )
        for call in message.get("tool_calls", ())
    ]
    answer = pb.ChatMessage(role="assistant", content=message.get("content", ""), tool_calls=calls)
    prompt = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(**USER), answer]))
    return pb.GenerateRequest(prompt=prompt), {"messages": [USER, {"role": "assistant"} | message]}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


REFUSED = {
    "no name": (ask([tool("")]), "tools[0].name: '' is not valid, expected 1 to 64 letters"),
    "a name with a blank": (ask([tool("a b")]), "tools[0].name: 'a b' is not valid"),
    "a long name": (ask([tool("a" * 65)]), "tools[0].name: "),
    "a name twice": (
        ask([tool("a"), tool("b"), tool("a")]),
        "tools[2].name: 'a' is not valid, expected a name that no other",
    ),
    "many tools": (
        ask([tool(f"f{i}") for i in range(129)]),
        "tools: '129 tools' is not valid, expected at most 128 tools",
    ),
    "an argument for all": (
        ask([tool(parameters={"type": "array"})]),
        "tools[0].parameters: 'array' is not valid",
    ),
    "a schema that is none": (
        ask([*openai_tools(), tool(parameters={"properties": {"a": {"type": "text"}}})]),
        (
            "tools[2].parameters: {'properties': {'a': {'type': 'text'}}} is not valid, expected a schema"
            " that can be followed ("
        ),
    ),
    "an unknown format, strictly": (
        ask([tool(parameters={"properties": {"a": {"type": "string", "format": "colour"}}}, strict=True)]),
        "tools[0].parameters: ",
    ),
    "a choice without tools": (
        ask([], "required"),
        "tool_choice: 'required' is not valid, expected tools to choose from",
    ),
    "a function without tools": (
        ask([], named("f")),
        "tool_choice: 'f' is not valid, expected tools to choose from",
    ),
    "an unknown function": (
        ask([tool("f")], named("g")),
        "tool_choice: 'g' is not valid, expected the name of one of",
    ),
    "no end": (ask([tool("f")], ignore_eos=True), "ignore_eos: True is not valid, expected false with tools"),
    "a call of nothing": (talk(tool_calls=[call("", "{}")]), "prompt.chat.messages[1].tool_calls[0].name: "),
    "arguments that are no JSON": (
        talk(tool_calls=[call("f", "{}"), call("f", "{a}")]),
        "prompt.chat.messages[1].tool_calls[1].arguments: '{a}' is not valid, expected a JSON object",
    ),
    "arguments that are no object": (
        talk(tool_calls=[call("f", "[1]")]),
        "prompt.chat.messages[1].tool_calls[0].arguments: ",
    ),
}
TAKEN = {
    "tools": ask(openai_tools()),
    "auto": ask(openai_tools(), "auto"),
    "required": ask(openai_tools(), "required", parallel=False),
    "one of them": ask(openai_tools(), named("stop")),
    "none of them": ask(openai_tools(), "none"),
    "no tools": ask([], "none", parallel=True),
    "an unknown format": ask(
        [tool(parameters={"properties": {"a": {"type": "string", "format": "colour"}}})]
    ),
    "a call": talk(tool_calls=[call("f", ""), call("g", '{"b": 1, "a": [1.5, null]}')]),
}


async def test_both_refuse_it_with_the_same_message(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, subtests: pytest.Subtests
) -> None:
    for name, ((request, body), message) in REFUSED.items():
        with subtests.test(name):
            refusal = await over_grpc(generation, request)
            check_same(refusal, await over_http(http, body))
            assert (refusal.details() or "").startswith(message)
            assert cluster.requests == []


async def test_both_accept_it_and_make_the_same_request_of_it(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, subtests: pytest.Subtests
) -> None:
    for name, (request, body) in TAKEN.items():
        cluster.requests.clear()
        with subtests.test(name):
            request = pb.GenerateRequest.FromString(request.SerializeToString())
            request.request_id = request.client_id = "mine"
            request.sampling.max_tokens = 9
            await generation.Generate(request)
            assert (
                await over_http(http, body | {"max_tokens": 9, "user": "mine"}, **{"x-request-id": "mine"})
            ).status_code == 200
            over_one, over_the_other = cluster.requests
            assert over_one == over_the_other


async def test_prompt_and_grammar_contain_the_tools_that_the_client_chose(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    for name in ("none of them", "tools", "required", "one of them"):
        await generation.Generate(TAKEN[name][0])
    none, auto, required, one = cluster.requests
    prompts = [cluster.tokenizer.decode(request.prompt_token_ids) for request in cluster.requests]
    assert ["get_weather" in prompt for prompt in prompts] == [False, True, True, True]
    assert (none.sampling.grammar, none.has_tools) == ("", False)
    assert "TEXT" in auto.sampling.grammar and "TEXT" not in required.sampling.grammar
    assert "get_weather" in required.sampling.grammar and "get_weather" not in one.sampling.grammar


async def test_tokenizing_a_conversation_counts_its_tools(generation: Stub, http: httpx.AsyncClient) -> None:
    request, body = TAKEN["tools"]
    tokenized = (await http.post("/tokenize", json=body)).json()
    assert tokenized["tokens"] == list(
        (await generation.Tokenize(pb.TokenizeRequest(prompt=request.prompt))).token_ids
    )
    assert (
        "get_weather"
        in (await http.post("/detokenize", json={"tokens": tokenized["tokens"]})).json()["prompt"]
    )
    refused = await http.post("/tokenize", json={"prompt": "a", "tools": body["tools"]})
    assert refused.json()["error"]["message"].startswith(
        "tools: '2 tools' is not valid, expected none without messages"
    )


async def test_tools_exclude_another_constraint(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    _, body = TAKEN["tools"]
    body = body | {"response_format": {"type": "json_object"}}
    error = (await over_http(http, body)).json()["error"]
    assert error["message"].startswith(
        "response_format: 'json_object' is not valid, expected none beside tools, unless"
    )
    assert (await over_http(http, body | {"tool_choice": "none"})).status_code == 200
    assert len(cluster.requests) == 1


ONLY_GRPC = {
    "parameters that are no JSON": (
        pb.Tool(name="f", parameters="{a}"),
        "tools[0].parameters: '{a}' is not valid, expected a JSON",
    ),
    "parameters that are no object": (
        pb.Tool(name="f", parameters="[]"),
        "tools[0].parameters: '[]' is not valid, expected a JSON",
    ),
    "no number": (pb.Tool(name="f", parameters='{"default": NaN}'), "tools[0].parameters: "),
    "half a character": (pb.Tool(name="f", parameters='{"default": "\\ud800"}'), "tools[0].parameters: "),
    "deep parameters": (
        pb.Tool(name="f", parameters='{"a":' * 100 + "[]" + "}" * 100),
        'tools[0].parameters: \'{"a":{"a":',
    ),
    "endlessly deep parameters": (
        pb.Tool(name="f", parameters='{"a":' * 2500 + "1" + "}" * 2500),
        "tools[0].parameters: ",
    ),
    "long parameters": (
        pb.Tool(name="f", parameters=json.dumps({"description": "a" * 20_000})),
        "tools: '20019 bytes of parameters' is not valid, expected at most 20000 bytes",
    ),
}


@pytest.mark.parametrize("name", ONLY_GRPC)
async def test_grpc_refuses_requests_that_http_cannot_express(
    generation: Stub, cluster: ScriptedCluster, name: str
) -> None:
    message, expected = ONLY_GRPC[name]
    chat = pb.Chat(messages=[pb.ChatMessage(**USER)], tools=[message])
    refusal = await over_grpc(generation, pb.GenerateRequest(prompt=pb.Prompt(chat=chat)))
    assert (refusal.details() or "").startswith(expected)
    assert cluster.requests == []


async def test_an_unknown_mode_is_refused(generation: Stub) -> None:
    for mode in (0, 9):
        request, _ = ask(openai_tools())
        request.prompt.chat.tool_choice.mode = mode  # type: ignore[assignment]
        assert (
            (await over_grpc(generation, request)).details()
            == f"tool_choice: {mode} is not valid, expected none, auto, required, or a function's name"
        )


ONLY_HTTP: dict[str, tuple[dict[str, Any], str]] = {
    "a tool of no type": (
        {"messages": [{"role": "user"}], "tools": [{"function": {"name": "f"}}]},
        "tools[0].type: missing, expected a value",
    ),
    "a tool of another type": (
        {"messages": [{"role": "user"}], "tools": [{"type": "custom", "function": {"name": "f"}}]},
        "tools[0].type: 'custom' is not valid, expected 'function'",
    ),
    "another choice": (
        {"messages": [{"role": "user"}], "tool_choice": "any"},
        "tool_choice: 'any' is not valid, expected none,",
    ),
}


@pytest.mark.parametrize("name", ONLY_HTTP)
async def test_http_refuses_requests_that_grpc_cannot_express(
    http: httpx.AsyncClient, cluster: ScriptedCluster, name: str
) -> None:
    body, message = ONLY_HTTP[name]
    response = await over_http(http, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert cluster.requests == []


@pytest.mark.parametrize("model", ["without tools"])
async def test_a_template_without_a_place_for_tools_or_calls_gets_none(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    for (request, body), field in (
        (TAKEN["tools"], "tools"),
        (TAKEN["a call"], "prompt.chat.messages[1].tool_calls"),
    ):
        refusal = await over_grpc(generation, request)
        check_same(refusal, await over_http(http, body))
        assert (refusal.details() or "").startswith(f"{field}: '2 ")
        assert (refusal.details() or "").endswith(
            "expected none, as the model's chat template has no place for them"
        )
    assert cluster.requests == []
    assert (await over_http(http, TAKEN["none of them"][1])).status_code == 200
