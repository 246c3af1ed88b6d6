"""The tools that a request lets the model call, read from the client's message and checked."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
MAX_DEPTH = 100  # of JSON
NAME = "1 to 64 letters, digits, underscores or hyphens"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedTool:
    """One function."""

    name: str
    description: str
    parameters: dict[str, Any] | None  # a JSON schema; None: it takes no arguments
    is_strict: bool

    def for_template(self) -> dict[str, Any]:
        """Returns the tool in OpenAI's format, for which chat templates are written."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedTools:
    """The tools that the model sees, and those that it may call: the same ones, unless the client chose
    one."""

    tools: tuple[OfferedTool, ...]
    callable: tuple[OfferedTool, ...]
    must_call: bool
    is_parallel: bool

    @staticmethod
    def read(chat: pb.Chat, limits: LimitsSection) -> "OfferedTools | None":
        """Returns None if nothing is to be called. Raises InvalidRequest."""
        tools = _tools(chat.tools, limits)
        kind = chat.tool_choice.WhichOneof("kind")
        mode = chat.tool_choice.mode if kind == "mode" else pb.TOOL_CHOICE_MODE_UNSPECIFIED
        if kind == "mode" and mode not in _MODES:
            raise InvalidRequest("tool_choice", mode, "none, auto, required, or a function's name")
        if not tools and (kind == "function" or mode == pb.TOOL_CHOICE_MODE_REQUIRED):
            raise InvalidRequest(
                "tool_choice", chat.tool_choice.function or "required", "tools to choose from"
            )
        if not tools or mode == pb.TOOL_CHOICE_MODE_NONE:
            return None
        return OfferedTools(
            tools=tools,
            callable=tools if kind != "function" else _chosen(tools, chat.tool_choice.function),
            must_call=kind == "function" or mode == pb.TOOL_CHOICE_MODE_REQUIRED,
            is_parallel=chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True,
        )


_MODES = (pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_NONE, pb.TOOL_CHOICE_MODE_REQUIRED)


def _chosen(tools: Sequence[OfferedTool], name: str) -> tuple[OfferedTool, ...]:
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        raise InvalidRequest("tool_choice", name, "the name of one of the tools")
    return chosen


def _tools(messages: Sequence[pb.Tool], limits: LimitsSection) -> tuple[OfferedTool, ...]:
    if len(messages) > limits.max_tools:
        raise InvalidRequest("tools", f"{len(messages)} tools", f"at most {limits.max_tools} tools")
    num_bytes = sum(len(message.parameters.encode()) for message in messages)
    if num_bytes > limits.max_tool_bytes:
        raise InvalidRequest(
            "tools", f"{num_bytes} bytes of parameters", f"at most {limits.max_tool_bytes} bytes"
        )
    tools = tuple(_tool(f"tools[{index}]", message) for index, message in enumerate(messages))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise InvalidRequest(f"tools[{index}].name", tool.name, "a name that no other tool has")
        seen.add(tool.name)
    return tools


def _tool(path: str, message: pb.Tool) -> OfferedTool:
    if not _NAME.fullmatch(message.name):
        raise InvalidRequest(f"{path}.name", message.name, NAME)
    parameters = json_object(f"{path}.parameters", message.parameters) if message.parameters else None
    if parameters is not None and parameters.get("type", "object") != "object":
        raise InvalidRequest(f"{path}.parameters", parameters["type"], "a schema of type object")
    return OfferedTool(
        name=message.name, description=message.description, parameters=parameters, is_strict=message.strict
    )


def json_object(field: str, text: str) -> dict[str, Any]:
    """Raises InvalidRequest if `text` is not a JSON object, or a deep one: later stages recurse."""
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(field, text, f"a JSON object ({error})") from error
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise InvalidRequest(field, text, f"a JSON object of at most {MAX_DEPTH} levels")


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
