"""The names that fields have over HTTP, where they differ from those of the messages that both servers share.
Pure."""

import re
from collections.abc import Callable

from ...core.errors import InvalidRequest, Problem
from .answer_options import AnswerOptions

Renaming = tuple[re.Pattern[str], str | Callable[[AnswerOptions], str]]

_ANY: tuple[Renaming, ...] = (
    (re.compile(r"constraint(\.[a-z_]+)?"), lambda options: options.constraint_field),
    (re.compile(r"max_tokens"), lambda options: options.max_tokens_field),
    (re.compile(r"client_id"), "user"),
    (re.compile(r"prompt\.truncate_tokens"), "truncate_prompt_tokens"),
)
_PROMPT: tuple[Renaming, ...] = (
    (re.compile(r"prompt_logprobs"), "logprobs"),
    (re.compile(r"prompt(\.text|\.token_ids|_token_ids)"), "prompt"),
)
_CHAT: tuple[Renaming, ...] = (
    (re.compile(r"logprobs"), "top_logprobs"),
    (re.compile(r"prompt\.chat\.template_kwargs"), "chat_template_kwargs"),
    (re.compile(r"prompt\.chat\.(?!messages)"), ""),
    (re.compile(r"prompt(\.chat)?(\.messages)?"), "messages"),
    (re.compile(r"(tools\[\d+\])\.(?!function|type)"), r"\1.function."),
)
_CALLS = re.compile(r"(messages\[\d+\]\.tool_calls\[\d+\])\.(name|arguments)")
_DETOKENIZED: tuple[Renaming, ...] = ((re.compile(r"token_ids"), "tokens"),)
_OF_KIND = {"prompt": _PROMPT, "chat": _CHAT, "tokens": _DETOKENIZED}


def in_http_words(error: InvalidRequest, options: AnswerOptions) -> InvalidRequest:
    """Returns the same refusal with the names that the body's fields have."""
    problems = [Problem(_field(p.field, options), p.shown, p.expected) for p in error.problems]
    return type(error).of(problems, error.reason)


def _field(field: str, options: AnswerOptions) -> str:
    for pattern, name in (*_ANY, *_OF_KIND[options.kind]):
        if (match := pattern.match(field)) is not None:
            new = match.expand(name) if isinstance(name, str) else name(options) or match[0]
            field = new + field[match.end() :]
            break
    return _CALLS.sub(r"\1.function.\2", field)
