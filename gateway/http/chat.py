"""Translates a conversation and its tools from OpenAI's format to the message of the gRPC API."""

from collections.abc import Sequence

from msgspec.json import encode

from ...proto import pdserve_pb2 as pb
from .chat_schema import ChatCompletionRequest, ChatMessage, ChosenTool, Tool

_MODES = {
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def chat_prompt(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], add_generation_prompt: bool
) -> pb.Prompt:
    """Returns everything but the tool choice."""
    chat = pb.Chat(
        messages=map(_message, messages), tools=map(_tool, tools), add_generation_prompt=add_generation_prompt
    )
    return pb.Prompt(chat=chat)


def set_choice(chat: pb.Chat, body: ChatCompletionRequest) -> None:
    """Returns whether tools are to be called, and which."""
    if isinstance(body.tool_choice, ChosenTool):
        chat.tool_choice.function = body.tool_choice.function.name
    elif body.tool_choice is not None:
        chat.tool_choice.mode = _MODES[body.tool_choice]
    if body.parallel_tool_calls is not None:
        chat.parallel_tool_calls = body.parallel_tool_calls


def _message(message: ChatMessage) -> pb.ChatMessage:
    calls = [
        pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls
    ]
    return pb.ChatMessage(
        role=message.role,
        content=message.content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _tool(tool: Tool) -> pb.Tool:
    function = tool.function
    parameters = "" if function.parameters is None else encode(function.parameters).decode()
    return pb.Tool(
        name=function.name, description=function.description, parameters=parameters, strict=function.strict
    )
