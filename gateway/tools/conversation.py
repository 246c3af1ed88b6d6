"""The messages of a conversation in the form that chat templates expect, calls and their results included."""

import re
from collections.abc import Iterator
from typing import Any

from ...core.errors import MISSING, InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..text.chat_template import NO_OPTIONS, TemplateOptions
from .offer import json_object

MAX_TEMPLATE_KWARGS = 64
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)


def opens_answer(chat: pb.Chat) -> bool:
    """Returns whether the template opens the assistant's turn after the last message."""
    return (
        chat.add_generation_prompt
        if chat.HasField("add_generation_prompt")
        else not chat.continue_final_message
    )


def template_options(chat: pb.Chat) -> TemplateOptions:
    """Raises InvalidRequest."""
    if not (chat.template_kwargs or chat.documents or chat.continue_final_message):
        return NO_OPTIONS
    return TemplateOptions(
        documents=[dict(document.fields) for document in chat.documents] or None,
        kwargs=_template_kwargs(chat.template_kwargs) if chat.template_kwargs else {},
        continues_final_message=chat.continue_final_message,
    )


def _template_kwargs(text: str) -> dict[str, Any]:
    """Returns the client's variables for the template, plain JSON. Raises InvalidRequest for names that no
    template could use; `ChatTemplate` refuses those that it gets from elsewhere."""
    field = "prompt.chat.template_kwargs"
    values = json_object(field, text)
    if len(values) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequest(field, f"{len(values)} names", f"at most {MAX_TEMPLATE_KWARGS}")
    for name in values:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(field, name, "names of 1 to 64 letters, digits and underscores")
    return values


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
        raise InvalidRequest(f"{path}.role", MISSING, "a role such as user")
    converted: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        converted["tool_calls"] = list(_calls(path, message))
    for name in ("tool_call_id", "name", "reasoning_content"):
        if value := getattr(message, name):
            converted[name] = value
    if message.reasoning_content:  # as in transformers: the name in gpt-oss's templates
        converted["thinking"] = message.reasoning_content
    return converted


def _calls(path: str, message: pb.ChatMessage) -> Iterator[dict[str, Any]]:
    for index, call in enumerate(message.tool_calls):
        field = f"{path}.tool_calls[{index}]"
        if not call.name:
            raise InvalidRequest(f"{field}.name", MISSING, "the name of a tool")
        # templates write arguments as JSON themselves; some clients send an empty string for none
        arguments = json_object(f"{field}.arguments", call.arguments) if call.arguments else {}
        yield {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
