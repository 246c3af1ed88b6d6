"""Translates a conversation and its tools from OpenAI's format to the message of the gRPC API."""

from typing import Any

from msgspec.json import encode

from ...core.errors import MISSING, InvalidRequest
from ...proto import pdserve_pb2 as pb
from .chat_schema import ChatCompletionRequest, ChatMessage, ChosenTool, TokenizeRequest, Tool
from .constraint import json_text

_MODES = {
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def chat_prompt(body: ChatCompletionRequest | TokenizeRequest, found: list[InvalidRequest]) -> pb.Prompt:
    """Returns everything but the tool choice; adds what is wrong to `found`."""
    chat = pb.Chat(
        messages=[_message(index, message, found) for index, message in enumerate(body.messages)],
        tools=map(_tool, body.tools),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    if body.documents:
        chat.documents.extend(pb.Document(fields=fields) for fields in body.documents)
    if (kwargs := _kwargs(body)) is not None:
        try:
            chat.template_kwargs = json_text(kwargs)
        except ValueError:
            found.append(InvalidRequest("chat_template_kwargs", kwargs, "numbers that JSON has"))
    return pb.Prompt(chat=chat)


def _kwargs(body: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any] | None:
    kwargs = body.chat_template_kwargs
    effort = body.reasoning_effort if isinstance(body, ChatCompletionRequest) else None
    return kwargs if effort is None else {"reasoning_effort": effort} | (kwargs or {})


def set_choice(chat: pb.Chat, body: ChatCompletionRequest) -> None:
    """Returns whether tools are to be called, and which."""
    if isinstance(body.tool_choice, ChosenTool):
        chat.tool_choice.function = body.tool_choice.function.name
    elif body.tool_choice is not None:
        chat.tool_choice.mode = _MODES[body.tool_choice]
    if body.parallel_tool_calls is not None:
        chat.parallel_tool_calls = body.parallel_tool_calls


def _message(index: int, message: ChatMessage, found: list[InvalidRequest]) -> pb.ChatMessage:
    if message.content is None and message.role != "assistant":
        found.append(InvalidRequest(f"messages[{index}].content", MISSING, "a text"))
    calls = [
        pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls
    ]
    return pb.ChatMessage(
        role=message.role,
        content=message.content or "",
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
        reasoning_content=message.reasoning_content,
    )


def _tool(tool: Tool) -> pb.Tool:
    function = tool.function
    parameters = "" if function.parameters is None else encode(function.parameters).decode()
    return pb.Tool(
        name=function.name, description=function.description, parameters=parameters, strict=function.strict
    )
