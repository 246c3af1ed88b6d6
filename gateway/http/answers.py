"""The bodies of responses as OpenAPI describes them. `format` writes them without these models; a test
compares."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .schema import FinishReason, Usage


class ResponseModel(BaseModel):
    """Base of responses, which have no undeclared fields."""

    model_config = ConfigDict(extra="forbid")


class CompletionLogprobs(ResponseModel):
    """Lists with one item per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(ResponseModel):
    """The answer to a completion; in a stream, a chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(ResponseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, with the most probable ones at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(ResponseModel):
    """The log probabilities of every token of the answer."""

    content: list[ChatTokenLogprob]


class ReturnedFunction(ResponseModel):
    """The function that a tool call names, and its arguments."""

    name: str
    arguments: str


class ReturnedToolCall(ResponseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: ReturnedFunction


class CalledFunctionDelta(ResponseModel):
    """The name, at the beginning of a call, and the next part of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """The next part of a call; id and type at its beginning."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class ChatAnswer(ResponseModel):
    """The assistant's text and calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ReturnedToolCall] | None = None


class ChatAnswerDelta(ResponseModel):
    """The next part of the assistant's text and calls."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(ResponseModel):
    """One continuation."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseModel):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(ResponseModel):
    """The next part of one continuation."""

    index: int
    delta: ChatAnswerDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(ResponseModel):
    """A chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Tokens(ResponseModel):
    """The answer to /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(ResponseModel):
    """The answer to /detokenize."""

    prompt: str


class ServedModel(ResponseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    default_sampling: dict[str, float]
    """The values of fields that a request leaves unset, where the checkpoint's generation_config.json has
    others than OpenAI's interface."""


class Models(ResponseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[ServedModel]


class Version(ResponseModel):
    """The version of the server."""

    version: str


class ClusterHealth(ResponseModel):
    """The health of the cluster."""

    status: str
    reasons: list[str]


class Startup(ResponseModel):
    """The progress of the cluster's start."""

    phase: Literal["starting", "started"]
    progress: float
    workers: dict[str, Any] = {}
    """By name; missing if keys are required and none was given."""
