"""The shape of an answer."""

from typing import Literal

import msgspec


class AnswerOptions(msgspec.Struct, frozen=True):
    """The shape of the answer that a body asks for, and what it calls the fields that have several names."""

    stream: bool = False
    echo: bool = False
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False
    running_usage: bool = False
    token_texts: bool = False
    request_id: str = ""  # as the body names it
    kind: Literal["prompt", "chat", "tokens"] = "prompt"
    max_tokens_field: str = "max_tokens"
    constraint_field: str = ""
