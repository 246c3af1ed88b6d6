"""Translates the bytes of a body to the messages that gRPC clients send, and to the shape of the answer.

Pure, and the same wherever it runs: in the head for small bodies, in the intake process for large ones.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError

from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..vetting import Bounds, check_message, refuse_unknown_fields
from .chat_schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from .errors import malformed
from .schema import CompletionRequest, GenerationBody
from .translate import chat_message, completion_messages, detokenize_message, tokenize_message

Model = TypeVar("Model", bound=BaseModel)

SMALL_BYTES = 1 << 16  # the largest body or message that the head reads by itself
SMALL_VALUES = 1024  # lists and objects: 3 us each
MAX_VALUES = 250_000  # of a body, numbers apart
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # possessive: linear even if none is closed


class AnswerOptions(msgspec.Struct, frozen=True):
    """The shape of the answer that a body asks for."""

    stream: bool = False
    echo: bool = False
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False
    running_usage: bool = False
    token_texts: bool = False


def is_small(data: bytes) -> bool:
    """Returns whether the body can be read on a loop, i.e. in a few milliseconds."""
    return len(data) <= SMALL_BYTES and data.count(b"{") + data.count(b"[") <= SMALL_VALUES


def read_body(
    kind: str, data: bytes, request_id: str, bounds: Bounds
) -> tuple[Sequence[Message], AnswerOptions]:
    """Returns the messages in a body for the route `kind`, at least one. Raises InvalidRequest or
    UnknownModel."""
    if len(data) > SMALL_BYTES:
        _check_values(data)
    messages, options = _READERS[kind](data, request_id, bounds)
    for message in messages:
        refuse_unknown_fields(message)
        check_message(message, bounds)
    return messages, options


def _check_values(data: bytes) -> None:
    """Counts values before objects are made of them. Numbers are cheap, and there may be as many as prompts
    have tokens."""
    if data.count(b'"') // 2 + data.count(b"[") + data.count(b"{") <= MAX_VALUES:
        return
    rest, num_texts = _TEXT.subn(b"", data)
    if num_texts + rest.count(b"[") + rest.count(b"{") > MAX_VALUES:
        raise InvalidRequest("body", f"{len(data)} bytes", f"at most {MAX_VALUES} texts, lists and objects")


def _validated(model: type[Model], data: bytes) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise malformed(error) from error


def _completions(data: bytes, request_id: str, bounds: Bounds) -> tuple[Sequence[Message], AnswerOptions]:
    body = _validated(CompletionRequest, data)
    return completion_messages(body, request_id, bounds.limits), _options(
        body, body.logprobs is not None, body.echo
    )


def _chat(data: bytes, request_id: str, bounds: Bounds) -> tuple[Sequence[Message], AnswerOptions]:
    body = _validated(ChatCompletionRequest, data)
    return [chat_message(body, request_id, bounds.limits)], _options(body, body.logprobs)


def _tokenize(data: bytes, request_id: str, bounds: Bounds) -> tuple[Sequence[Message], AnswerOptions]:
    body = _validated(TokenizeRequest, data)
    return [tokenize_message(body)], AnswerOptions(token_texts=body.return_token_strs)


def _detokenize(data: bytes, request_id: str, bounds: Bounds) -> tuple[Sequence[Message], AnswerOptions]:
    return [detokenize_message(_validated(DetokenizeRequest, data))], AnswerOptions()


def _options(body: GenerationBody, logprobs: bool, echo: bool = False) -> AnswerOptions:
    options = body.stream_options
    return AnswerOptions(
        stream=body.stream,
        echo=echo,
        logprobs=logprobs,
        token_ids=body.return_token_ids,
        usage=options is not None and options.include_usage,
        running_usage=options is not None and options.continuous_usage_stats,
    )


Reader = Callable[[bytes, str, Bounds], tuple[Sequence[Message], AnswerOptions]]
_READERS: dict[str, Reader] = {
    "completions": _completions,
    "chat": _chat,
    "tokenize": _tokenize,
    "detokenize": _detokenize,
}
MESSAGES: dict[str, type[Message]] = {
    "completions": pb.GenerateRequest,
    "chat": pb.GenerateRequest,
    "tokenize": pb.TokenizeRequest,
    "detokenize": pb.DetokenizeRequest,
}
