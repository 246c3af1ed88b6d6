"""Calls are returned in each API's format, to the official clients too."""

import asyncio
from typing import Any, TypeAlias, cast

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageToolCall

from pdserve.core.messages import TokenOutput
from pdserve.core.request import FinishReason, Request, SamplingParams, TransferId
from pdserve.gateway.answer import Collector, ResponseEvents
from pdserve.gateway.app import GatewayServer
from pdserve.gateway.frontend import StreamEvent
from pdserve.gateway.http import answers
from pdserve.gateway.tools.formats import ToolFormat
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from pdserve.router.events import EmitChoiceEnd, EmitTokens
from tests.gateway.both_apis import over_http
from tests.gateway.support import ScriptedCluster
from tests.gateway.test_http import check, chunks
from tests.gateway.tools.asking import ARGUMENTS, CALLS, USER, ask, named, saying
from tests.gateway.tools.models import MODELS, TOOLS, openai_tools, written

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("model", MODELS)
def test_calls_are_separated_from_text_however_tokens_arrive(model: str, size: int) -> None:
    """Feeds tokens one by one, in handfuls, and all at once."""
    calls, text = (CALLS, "Let me see.") if model != "llama3" else (CALLS[:1], "")
    output = saying(model, calls, text)
    outputs = [
        TokenOutput(transfer=TransferId("r", 0), choice=0, index=index, token_id=token_id)
        for index, token_id in enumerate(output.token_ids)
    ]
    request = Request(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(), has_tools=True)
    answer, collector = ResponseEvents(request, output.tokenizer, lambda choice: None), Collector()
    events: list[StreamEvent] = [
        EmitTokens("r", 0, tuple(outputs[i : i + size])) for i in range(0, len(outputs), size)
    ]
    for event in [*events, EmitChoiceEnd("r", 0, FinishReason.STOP)]:
        for out in answer.handle(event):
            collector.add(out)
            assert len({part.index for part in out.tokens.tool_calls}) == len(out.tokens.tool_calls)
    (choice,) = collector.response().choices
    assert choice.text == text
    assert [(item.name, item.arguments) for item in choice.tool_calls] == calls
    assert choice.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    ids = [item.id for item in choice.tool_calls]
    assert len(set(ids)) == len(ids)
    assert all(
        len(name) == 9 and name.isalnum() if model in ("mistral", "tekken") else name.startswith("call_")
        for name in ids
    )


@pytest.mark.parametrize("model", ["qwen", "llama3"])
async def test_an_answer_without_calls_is_text(
    generation: Stub, cluster: ScriptedCluster, model: str
) -> None:
    output = saying(model, [], "No {tool} can <tell>.")
    cluster.token_ids, cluster.eos_after = output.token_ids, output.eos_after
    (choice,) = (await generation.Generate(ask(openai_tools(), max_tokens=200)[0])).choices
    assert (choice.text, choice.finish_reason, list(choice.tool_calls)) == (
        "No {tool} can <tell>.",
        pb.FINISH_REASON_STOP,
        [],
    )


async def test_without_tools_nothing_is_a_call(generation: Stub, cluster: ScriptedCluster) -> None:
    for request, _ in (ask(openai_tools(), "none", max_tokens=200), ask([], max_tokens=200)):
        (choice,) = (await generation.Generate(request)).choices
        assert choice.text == written(ToolFormat.HERMES, CALLS, "Let me see.")
        assert choice.finish_reason == pb.FINISH_REASON_STOP


async def test_a_truncated_call_ends_by_its_length(generation: Stub, cluster: ScriptedCluster) -> None:
    cut = len(cluster.token_ids) - 4
    (choice,) = (await generation.Generate(ask(openai_tools(), max_tokens=cut)[0])).choices
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert choice.tool_calls[0].arguments == ARGUMENTS


async def test_a_stop_string_ends_text_and_is_ignored_in_calls(generation: Stub) -> None:
    (choice,) = (
        await generation.Generate(ask(openai_tools(), max_tokens=200, stop=["Köln", "see.X"])[0])
    ).choices
    assert (choice.text, choice.finish_reason) == ("Let me see.", pb.FINISH_REASON_TOOL_CALLS)
    (choice,) = (await generation.Generate(ask(openai_tools(), max_tokens=200, stop=["see"])[0])).choices
    assert (choice.text, choice.finish_reason, choice.stop_string) == (
        "Let me ",
        pb.FINISH_REASON_STOP,
        "see",
    )
    assert not choice.tool_calls


async def test_a_resumed_stream_continues_with_the_same_calls(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    request, _ = ask(openai_tools(), max_tokens=200, seed=1)
    request.request_id = "mine"
    events = [event.tokens async for event in generation.GenerateStream(request) if event.HasField("tokens")]
    for first in (5, 30, len(cluster.token_ids) - 3):
        request.resume_from[:] = [first]
        rest = [
            event.tokens async for event in generation.GenerateStream(request) if event.HasField("tokens")
        ]
        assert [d for d in rest if d.token_ids] == [d for d in events if d.index >= first and d.token_ids]


async def test_the_official_client_calls_tools(client: openai.AsyncOpenAI, cluster: ScriptedCluster) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=[USER], tools=openai_tools())
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert choice.message.tool_calls is not None
    output = [item for item in choice.message.tool_calls if isinstance(item, ChatCompletionMessageToolCall)]
    assert [(item.function.name, item.function.arguments) for item in output] == CALLS
    results: list[Any] = [{"role": "tool", "tool_call_id": item.id, "content": "sunny"} for item in output]
    await client.chat.completions.create(
        model="tiny",
        messages=[USER, cast(Any, choice.message), *results],
        tools=openai_tools(),
        tool_choice="none",
    )
    prompt = cluster.tokenizer.decode(cluster.requests[1].prompt_token_ids)
    assert written(ToolFormat.HERMES, CALLS, "Let me see.") in prompt
    assert prompt.count("<tool_response>\nsunny\n</tool_response>") == 2


async def test_the_official_client_streams_calls(
    client: openai.AsyncOpenAI, cluster: ScriptedCluster
) -> None:
    async with client.chat.completions.stream(
        model="tiny", messages=[USER], tools=openai_tools(), n=2
    ) as stream:
        kinds = {event.type async for event in stream}
        answer = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        assert [
            (item.function.name, item.function.arguments) for item in choice.message.tool_calls or ()
        ] == CALLS


async def test_the_synchronous_client_too(server: GatewayServer) -> None:
    def ask_it() -> tuple[list[str], str]:
        with openai.OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none") as client:
            given: Any = {
                "model": "tiny",
                "messages": [USER],
                "tools": openai_tools(),
                "tool_choice": named("get_weather"),
            }
            whole = client.chat.completions.create(**given).choices[0].message.tool_calls or ()
            parts = ""
            for chunk in client.chat.completions.create(**given, stream=True):
                parts += "".join(
                    (part.function and part.function.arguments) or ""
                    for part in chunk.choices[0].delta.tool_calls or ()
                )
            return [item.function.arguments for item in whole if item.type == "function"], parts

    assert await asyncio.to_thread(ask_it) == ([ARGUMENTS, "{}"], ARGUMENTS + "{}")


async def test_answers_are_as_openapi_describes_them(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    _, body = ask(openai_tools(), max_tokens=200)
    check(answers.ChatCompletion, (await over_http(http, body)).json())
    events = await chunks(http, "/v1/chat/completions", **body)
    for event in events:
        check(answers.ChatCompletionChunk, event)
    deltas = [event["choices"][0]["delta"] for event in events]
    begun = [part for delta in deltas for part in delta.get("tool_calls", ()) if "id" in part]
    assert [(part["index"], part["type"], part["function"]["name"]) for part in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "stop"),
    ]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_calls_alone_have_no_content(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    output = saying("qwen", CALLS)
    cluster.token_ids, cluster.eos_after = output.token_ids, output.eos_after
    message = (await over_http(http, ask(openai_tools(), max_tokens=200)[1])).json()["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == len(TOOLS)
