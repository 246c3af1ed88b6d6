"""The bodies of conversations, with their tools."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, PlainValidator, ValidationError, WithJsonSchema

from .schema import NO_ITEMS, Body, GenerationBody, OptionalText, TokenIds, expected


def _nothing(value: object) -> list[Any]:
    if value == []:
        return []
    raise expected("an empty list")


Nothing = Annotated[list[Any], PlainValidator(_nothing), WithJsonSchema({"type": "array", "maxItems": 0})]


class CalledFunction(Body):
    """The function that a tool call names, and its arguments."""

    name: str
    arguments: str
    """A JSON object."""


class ToolCall(Body):
    """A tool call, as an earlier answer reported it."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    """The chat template decides what becomes of it."""
    content: OptionalText = None
    """Only the assistant's may be missing."""
    tool_calls: Annotated[list[ToolCall], FailFast()] = Field(default=NO_ITEMS)
    """The assistant's tool calls."""
    tool_call_id: str = ""
    """The call that a tool's message answers."""
    name: str = ""
    """The author of the message, for templates that use it."""
    reasoning_content: str = ""
    """The assistant's thoughts before its answer, for templates that use them."""
    id: str = ""
    """Without effect, as is `cache_control`."""
    cache_control: dict[str, Any] | None = None
    annotations: Nothing = Field(default=NO_ITEMS)
    """Empty."""


class Function(Body):
    """A function that the model may call."""

    name: str
    """1 to 64 letters, digits, underscores or hyphens."""
    description: str = ""
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments, which calls follow."""
    strict: bool = False
    """Refuse `parameters` with keywords or formats that calls are not kept to, instead of ignoring them."""
    cache_control: dict[str, Any] | None = None
    """Without effect."""


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = None
    """Without effect."""


class ChosenFunction(Body):
    """The name of a function."""

    name: str


class ChosenTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


def _choice(value: object) -> str | ChosenTool:
    """Validates by hand, as a union would report each of its members that does not fit."""
    if isinstance(value, str) and value in _MODES:
        return value
    if isinstance(value, dict):
        with suppress(ValidationError):
            return ChosenTool.model_validate(value)
    raise expected('none, auto, required, or {"type": "function", "function": {"name": ...}}')


_MODES = ("none", "auto", "required")
_NAME = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": list(_MODES)},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _NAME},
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}
ToolChoice = Annotated[str | ChosenTool, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]
Tools = Annotated[list[Tool], FailFast()]


class ChatCompletionRequest(GenerationBody):
    """Continue a conversation."""

    messages: Annotated[list[ChatMessage], FailFast()]
    """The conversation, oldest message first."""
    logprobs: bool = False
    """Report the log probability of each token."""
    top_logprobs: int | None = None
    """Report this many most probable alternatives too. Above 0 only with `logprobs`."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn after the last message; by default unless
    `continue_final_message`."""
    continue_final_message: bool = False
    """The answer continues the text of the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables for the chat template, such as enable_thinking."""
    reasoning_effort: str | None = None
    """A variable for the chat template, unless `chat_template_kwargs` has it."""
    documents: Annotated[list[dict[str, str]], FailFast()] = Field(default=NO_ITEMS)
    """Texts that the answer may draw upon, if the chat template has a place for documents."""
    echo: Literal[False] = False
    """Only false, as `add_special_tokens`: chat templates write their own."""
    add_special_tokens: Literal[False] = False
    modalities: Annotated[list[Literal["text"]], FailFast()] = Field(default=NO_ITEMS)
    """Only text. `verbosity` is without effect; `function_call` is none or auto, `functions` empty."""
    verbosity: Literal["low", "medium", "high"] | None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Nothing = Field(default=NO_ITEMS)
    tools: Tools = Field(default=NO_ITEMS)
    """The tools that the model may call, if its chat template has a place for tools."""
    tool_choice: ToolChoice | None = None
    """Whether it calls any: "none", "auto" (the default, when there are tools), "required", or the one that
    it has to call."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once. By default it may."""


class TokenizeRequest(Body):
    """The token ids of a prompt, exactly as a completion would use them: from a text, or from a
    conversation."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast()] = Field(default=NO_ITEMS)
    tools: Tools = Field(default=NO_ITEMS)
    """Only with `messages`."""
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    """Only with `messages`, as `documents`."""
    documents: Annotated[list[dict[str, str]], FailFast()] = Field(default=NO_ITEMS)
    return_token_strs: bool = False
    """Report the text of each token too."""


class DetokenizeRequest(Body):
    """The text of token ids."""

    model: str = ""
    tokens: TokenIds
