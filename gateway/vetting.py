"""Checks of a client's message that need no tokens: its shape, its names, and the number and size of its
parts.

They come first, in the head or, for large messages, in the intake process (`offload/`), with the same result.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ..core.config import LimitsSection
from ..core.errors import InvalidRequest
from ..core.validation import check_counts, check_name, check_prompt_length, max_prompt_tokens
from ..proto import pdserve_pb2 as pb
from .in_turns import STEPS
from .translate import UnknownModel

MAX_ITEMS = 10_000  # of a repeated field, other than token ids
MAX_PARTS = 100_000  # messages inside one message, at all levels
_TOKEN_IDS = ("ids", "token_ids")  # bounded by the model's length


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The maxima of one request to one model."""

    limits: LimitsSection
    model: str
    max_model_len: int
    max_token_chars: int  # of the longest token, as it stands in the vocabulary

    @property
    def max_prompt_tokens(self) -> int:
        return max_prompt_tokens(self.limits, self.max_model_len)

    @property
    def max_prompt_chars(self) -> int:
        """The length beyond which no text fits into the model, if every character is in some token."""
        return self.max_prompt_tokens * self.max_token_chars

    @property
    def max_counted_tokens(self) -> int:
        """The most tokens that Tokenize counts: it shows by how much a prompt is too long, but not for any
        prompt."""
        return 2 * self.max_prompt_tokens


def refuse_unknown_fields(message: Message) -> None:
    """Raises InvalidRequest if a client, newer than us or mistaken, sent fields that would otherwise be
    ignored; also for too many items, before each of them is examined. The message types bound the recursion
    depth."""
    for _ in walk(message):
        pass


def has_unknown_fields(message: Message) -> bool:
    """Returns whether there are any, at any level; cheaper than examining each field."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.ByteSize() != message.ByteSize()


async def vet(message: Message, bounds: Bounds) -> None:
    """`refuse_unknown_fields` and `check_message`, for a loop."""
    for index, _ in enumerate(walk(message), 1):  # as `in_turns` does, which costs more than a small message
        if index % STEPS == 0:
            await asyncio.sleep(0)
    check_message(message, bounds)


def walk(message: Message) -> Iterator[None]:
    """`refuse_unknown_fields` in small steps, one for each part of the message."""
    for index, _ in enumerate(_walk(message, "")):
        if index >= MAX_PARTS:
            raise InvalidRequest(
                message.DESCRIPTOR.name, f"more than {MAX_PARTS} parts", f"at most {MAX_PARTS}"
            )
        yield


def _walk(message: Message, path: str) -> Iterator[None]:
    yield
    unknown = UnknownFieldSet(message)
    if len(unknown):
        field = f"field {unknown[0].field_number}"
        raise InvalidRequest(
            path or message.DESCRIPTOR.name, field, f"only the fields of {message.DESCRIPTOR.full_name}"
        )
    for name, child in _children(message):
        yield from _walk(child, f"{path}.{name}" if path else name)


def _check_items(field: str, count: int) -> None:
    if count > MAX_ITEMS:
        raise InvalidRequest(field, f"{count} items", f"at most {MAX_ITEMS}")


def _children(message: Message) -> Iterator[tuple[str, Message]]:
    for descriptor, value in message.ListFields():
        if descriptor.name not in _TOKEN_IDS and not isinstance(value, Message | str | bytes | int | float):
            _check_items(descriptor.name, len(value))
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue  # a map of numbers
        if isinstance(value, Message):
            yield descriptor.name, value
        else:
            yield from ((f"{descriptor.name}[{index}]", item) for index, item in enumerate(value))


def check_message(message: Message, bounds: Bounds) -> None:
    """Runs after `walk`: raises InvalidRequest or UnknownModel for errors that show before tokenisation."""
    match message:
        case pb.GenerateRequest():
            check_model(message.model, bounds.model)
            for name in ("request_id", "cache_salt", "client_id"):
                check_name(name, getattr(message, name))
            if message.prompt.HasField("token_ids"):  # before millions of them are examined
                check_prompt_length(len(message.prompt.token_ids.ids), bounds.limits, bounds.max_model_len)
            check_prompt_size(message.prompt, bounds)
            sampling = message.sampling
            check_counts(
                bounds.limits,
                num_biases=len(sampling.logit_bias),
                num_stops=len(sampling.stop),
                num_stop_token_ids=len(sampling.stop_token_ids),
            )
        case pb.TokenizeRequest():
            check_model(message.model, bounds.model)
            check_counted(len(message.prompt.token_ids.ids), bounds)
            check_prompt_size(message.prompt, bounds)
        case pb.DetokenizeRequest():
            check_model(message.model, bounds.model)
            if len(message.token_ids) > bounds.max_model_len:
                got = f"{len(message.token_ids)} tokens"
                raise InvalidRequest(
                    "token_ids", got, f"at most {bounds.max_model_len} tokens, as many as the model takes"
                )


def check_model(name: str, served: str) -> None:
    if name and name != served:
        raise UnknownModel(name, served)


def check_prompt_size(prompt: pb.Prompt, bounds: Bounds) -> None:
    """Checks a prompt before it is rendered or tokenised. Raises InvalidRequest.

    The characters that were sent count. A tokenizer that makes fewer of them (a normalizer that drops some,
    an added token that absorbs the blanks around it, one token for a long unknown word) is no reason to
    process more of them."""
    if prompt.HasField("text") and not prompt.text:
        raise InvalidRequest("prompt.text", prompt.text, "a text that is not empty")
    if prompt.ByteSize() <= bounds.max_prompt_chars:
        return  # characters have a byte at least
    if prompt.HasField("text"):
        check_chars(len(prompt.text), bounds)
    elif prompt.HasField("chat"):
        check_chars(sum(len(message.content) for message in prompt.chat.messages), bounds)


def check_chars(num_chars: int, bounds: Bounds) -> None:
    """Raises InvalidRequest for a text that is too long, however few tokens it has."""
    if num_chars > bounds.max_prompt_chars:
        why = f"{bounds.max_prompt_tokens} tokens of at most {bounds.max_token_chars} each"
        raise InvalidRequest(
            "prompt", f"{num_chars} characters", f"at most {bounds.max_prompt_chars} characters ({why})"
        )


def check_counted(num_tokens: int, bounds: Bounds) -> None:
    """Raises InvalidRequest for more tokens than Tokenize counts."""
    if num_tokens > bounds.max_counted_tokens:
        expected = f"at most {bounds.max_counted_tokens} tokens, twice what a prompt may have"
        raise InvalidRequest("prompt", f"{num_tokens} tokens", expected)
