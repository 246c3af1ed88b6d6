"""Translates the bytes of a body to the messages that gRPC clients send, and to the shape of the answer.

Pure, and the same wherever it runs: in the head for small bodies, in the intake process for large ones.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest, joined, refuse
from ...core.validation import sampling_problems
from ...proto import pdserve_pb2 as pb
from ..sampling import sampling_params
from ..translate import UnknownModel
from ..vetting import RequestBounds, check_message_model, keep_end, message_problems, refuse_many_parts
from .answer_options import AnswerOptions
from .chat_schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from .constraint import constraint_field
from .errors import malformed
from .schema import CompletionRequest, GenerationBody
from .translate import chat_message, completion_messages, detokenize_message, tokenize_message
from .words import in_http_words

Model = TypeVar("Model", bound=BaseModel)

SMALL_BYTES = 1 << 16  # the largest body or message that the head reads by itself
SMALL_VALUES = 1024  # lists and objects: 3 us each
MAX_FAULTS = 16  # of one body that are looked at
MAX_VALUES = 250_000  # of a body, numbers apart
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # possessive: linear even if none is closed

_HEADER_TEXT = re.compile(r"[!-~]+", re.ASCII)


def is_small(data: bytes) -> bool:
    """Returns whether the body can be read on a loop, i.e. in a few milliseconds."""
    return len(data) <= SMALL_BYTES and data.count(b"{") + data.count(b"[") <= SMALL_VALUES


def read_body(
    route: str, data: bytes, request_id: str, bounds: RequestBounds, *, is_id_given: bool = True
) -> tuple[Sequence[Message], AnswerOptions]:
    """Returns the messages in a body for `route`, at least one. `request_id` comes from the request's head;
    if it is not given there, one in the body takes its place. Raises InvalidRequest, with all fields that are
    wrong, or UnknownModel."""
    if len(data) > SMALL_BYTES:
        _check_values(data)
    reader = _READERS[route]
    try:
        body = reader.model.model_validate_json(data, extra=_extra(bounds))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise joined(
            [*map(malformed, faults[:MAX_FAULTS]), *_further(reader, faults, data, bounds)]
        ) from None
    options = reader.options(body)
    own_id = "" if is_id_given else options.request_id
    found: list[InvalidRequest] = []
    if own_id and not _HEADER_TEXT.fullmatch(own_id):
        expected = "ASCII characters without blanks, as it comes back in a header"
        found.append(InvalidRequest("request_id", own_id, expected))
    try:
        messages = reader.messages(body, own_id or request_id, bounds.limits, found)
        for message in messages:
            refuse_many_parts(message)
            found += message_problems(message, bounds)
        if found:
            refuse([*found, *_beside(messages, bounds)])
        for message in messages:
            check_message_model(message, bounds)
            keep_end(message, bounds)
    except InvalidRequest as error:
        raise in_http_words(error, options) from error
    return messages, options


def _extra(bounds: RequestBounds) -> Literal["forbid", "ignore"]:
    return "forbid" if bounds.limits.unknown_fields == "refuse" else "ignore"


def _beside(messages: Sequence[Message], bounds: RequestBounds) -> Iterator[InvalidRequest]:
    """Yields what is wrong in messages beside what their bodies' types and sizes show."""
    for message in messages[:1]:  # all of them have the same parameters
        try:
            check_message_model(message, bounds)
        except UnknownModel as unknown:
            yield InvalidRequest("model", unknown.asked, repr(unknown.served))
        if isinstance(message, pb.GenerateRequest):
            yield from sampling_problems(sampling_params(message.sampling, 0), bounds.limits)


def _further(
    reader: "_Reader[Any]", faults: Sequence[ErrorDetails], data: bytes, bounds: RequestBounds
) -> Iterator[InvalidRequest]:
    """Yields what is wrong in the fields of a body whose other fields have been refused."""
    if not all(fault["loc"] for fault in faults):
        return  # it is no object
    refused = {fault["loc"][0] for fault in faults}
    rest = {name: value for name, value in from_json(data).items() if name not in refused}
    rest |= {name: value for name, value in reader.stand_ins.items() if name in refused}
    try:
        body = reader.model.model_validate(rest, extra=_extra(bounds))
    except ValidationError:  # one of the first that were refused had hidden others
        return
    found: list[InvalidRequest] = []
    try:
        messages = reader.messages(body, "", bounds.limits, found)
        for message in messages:
            found += message_problems(message, bounds)
        found += _beside(messages, bounds)
    except InvalidRequest as error:
        found.append(error)
    for problem in found:
        yield in_http_words(problem, reader.options(body))


def _check_values(data: bytes) -> None:
    """Counts values before objects are made of them. Numbers are cheap, and there may be as many as prompts
    have tokens."""
    if data.count(b'"') // 2 + data.count(b"[") + data.count(b"{") <= MAX_VALUES:
        return
    rest, num_texts = _TEXT.subn(b"", data)
    if num_texts + rest.count(b"[") + rest.count(b"{") > MAX_VALUES:
        raise InvalidRequest("body", f"{len(data)} bytes", f"at most {MAX_VALUES} texts, lists and objects")


def _options(body: GenerationBody, logprobs: bool, echo: bool = False) -> AnswerOptions:
    options = body.stream_options
    return AnswerOptions(
        stream=body.stream,
        echo=echo,
        logprobs=logprobs,
        token_ids=body.return_token_ids,
        usage=options is not None and options.include_usage,
        running_usage=options is not None and options.continuous_usage_stats,
        request_id=body.request_id,
        kind="chat" if isinstance(body, ChatCompletionRequest) else "prompt",
        max_tokens_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        constraint_field=constraint_field(body),
    )


@dataclass(frozen=True)
class _Reader(Generic[Model]):
    """How the bodies of one route are read."""

    model: type[Model]
    # with the request's id, and a list for what is wrong
    messages: Callable[[Model, str, LimitsSection, list[InvalidRequest]], Sequence[Message]]
    options: Callable[[Model], AnswerOptions]
    # valid values of required fields, in place of wrong ones, so that the others can be checked
    stand_ins: Mapping[str, Any]


_READERS: dict[str, _Reader[Any]] = {
    "completions": _Reader(
        CompletionRequest,
        completion_messages,
        lambda body: _options(body, body.logprobs is not None, body.echo),
        {"prompt": "-"},
    ),
    "chat": _Reader(
        ChatCompletionRequest,
        lambda body, request_id, limits, found: [chat_message(body, request_id, limits, found)],
        lambda body: _options(body, body.logprobs),
        {"messages": [{"role": "user", "content": "-"}]},
    ),
    "tokenize": _Reader(
        TokenizeRequest,
        lambda body, request_id, limits, found: [tokenize_message(body, found)],
        lambda body: AnswerOptions(
            token_texts=body.return_token_strs, kind="chat" if body.messages else "prompt"
        ),
        {},
    ),
    "detokenize": _Reader(
        DetokenizeRequest,
        lambda body, request_id, limits, found: [detokenize_message(body, found)],
        lambda body: AnswerOptions(kind="tokens"),
        {"tokens": []},
    ),
}
MESSAGES: dict[str, type[Message]] = {
    "completions": pb.GenerateRequest,
    "chat": pb.GenerateRequest,
    "tokenize": pb.TokenizeRequest,
    "detokenize": pb.DetokenizeRequest,
}
