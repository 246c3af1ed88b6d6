"""The messages of a conversation in the form that chat templates expect, calls and their results included."""

from collections.abc import Iterator
from typing import Any

from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb
from .offer import json_object


def template_messages(chat: pb.Chat, takes_calls: bool) -> list[dict[str, Any]]:
    """Returns the messages without their absent fields. Raises InvalidRequest, also for calls that the
    template has no place for, unless it `takes_calls`."""
    if not chat.messages:
        raise InvalidRequest("prompt.chat.messages", [], "at least one message")
    converted = []
    for index, message in enumerate(chat.messages):
        path = f"prompt.chat.messages[{index}]"
        if message.tool_calls and not takes_calls:
            expected = "none, as the model's chat template has no place for them"
            raise InvalidRequest(f"{path}.tool_calls", f"{len(message.tool_calls)} call(s)", expected)
        converted.append(_message(path, message))
    return converted


def _message(path: str, message: pb.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequest(f"{path}.role", "", "a role such as user")
    converted: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        converted["tool_calls"] = list(_calls(path, message))
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            converted[name] = value
    return converted


def _calls(path: str, message: pb.ChatMessage) -> Iterator[dict[str, Any]]:
    for index, call in enumerate(message.tool_calls):
        field = f"{path}.tool_calls[{index}]"
        if not call.name:
            raise InvalidRequest(f"{field}.name", "", "the name of a tool")
        # templates write arguments as JSON themselves; some clients send an empty string for none
        arguments = json_object(f"{field}.arguments", call.arguments) if call.arguments else {}
        yield {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
