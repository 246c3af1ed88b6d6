"""The same requests for both servers, and a cluster that answers with tool calls."""

import json
from typing import Any

from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import ScriptedCluster
from tests.gateway.tools.models import MODELS, written

USER: Any = {"role": "user", "content": "the weather?"}
ARGUMENTS = '{"city": "Köln", "unit": "C"}'
CALLS = [("get_weather", ARGUMENTS), ("stop", "{}")]


def saying(model: str, calls: list[tuple[str, str]], text: str = "") -> ScriptedCluster:
    tokenizer = MODELS[model]()
    assert tokenizer.templates.tool_format is not None
    cluster = ScriptedCluster(tokenizer, written(tokenizer.templates.tool_format, calls, text))
    cluster.eos_after = len(cluster.token_ids)
    return cluster


def as_messages(tools: list[dict[str, Any]]) -> list[pb.Tool]:
    functions = [tool["function"] for tool in tools]
    return [
        pb.Tool(
            name=function["name"],
            description=function.get("description", ""),
            parameters=json.dumps(function["parameters"]) if "parameters" in function else "",
            strict=function.get("strict", False),
        )
        for function in functions
    ]


def ask(
    tools: list[dict[str, Any]], choice: Any = None, parallel: bool | None = None, **sampling: Any
) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    """The same request for both servers."""
    chat = pb.Chat(messages=[pb.ChatMessage(**USER)], tools=as_messages(tools))
    body: dict[str, Any] = {"messages": [USER], "tools": tools} | sampling
    if isinstance(choice, dict):
        chat.tool_choice.function = choice["function"]["name"]
    elif choice is not None:
        chat.tool_choice.mode = pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{choice.upper()}")
    if choice is not None:
        body["tool_choice"] = choice
    if parallel is not None:
        chat.parallel_tool_calls = body["parallel_tool_calls"] = parallel
    return pb.GenerateRequest(prompt=pb.Prompt(chat=chat), sampling=pb.SamplingParams(**sampling)), body


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
