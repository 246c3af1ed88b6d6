"""Checks of a client's message that need no tokens: its shape, its names, and the number and size of its
parts.

They come first, in the head or, for large messages, in the intake process (`offload/`), with the same result.
"""

import asyncio
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ..core.config import LimitsSection
from ..core.errors import InvalidRequest, context_length_exceeded, refuse
from ..core.validation import check_name, check_prompt_length, count_problems, max_prompt_tokens
from ..proto import pdserve_pb2 as pb
from .in_turns import STEPS
from .sampling import with_sampling
from .translate import UnknownModel

MAX_ITEMS = 10_000  # of a repeated field, other than token ids
MAX_PARTS = 100_000  # messages inside one message, at all levels
MAX_UNKNOWN_BYTES = 4096  # of unknown fields, two bytes each at least, that are listed to name the first one
MAX_TEMPLATE_KWARGS_CHARS = 1 << 16
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
_TOKEN_IDS = ("ids", "token_ids")  # bounded by the model's length


class Fit(enum.Enum):
    """How many tokens a prompt may have, and why."""

    REQUEST = "request"  # as many as leave room for output
    COUNTED = "counted"  # twice as many: Tokenize shows by how much a prompt is too long
    TRUNCATED = "truncated"  # any number, of which the last are kept


@dataclass(frozen=True, kw_only=True)
class RequestBounds:
    """The maxima of one request to one model."""

    limits: LimitsSection
    model: str
    max_model_len: int
    max_token_chars: int  # of the longest token, as it stands in the vocabulary

    @property
    def max_prompt_tokens(self) -> int:
        return max_prompt_tokens(self.limits, self.max_model_len)

    @property
    def max_context(self) -> int:
        """The length of prompt and output that clients see; of the prompt, where that has a limit."""
        most = self.max_prompt_tokens
        return self.max_model_len if most == self.max_model_len - 1 else most

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
    _check_num_parts(message, _walk(message, ""))


def refuse_many_parts(message: Message) -> None:
    """As `refuse_unknown_fields` for a message that we have made ourselves, which has none."""
    _check_num_parts(message, _walk(message, "", is_ours=True))


def _check_num_parts(message: Message, parts: Iterator[None]) -> None:
    for _ in _counted(message, parts):
        pass


def check_unknown_bytes(message: Message) -> None:
    """Raises InvalidRequest for many unknown fields, before `walk` lists those of a part at once: each takes
    it some microseconds."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    num_bytes = message.ByteSize() - known.ByteSize()
    if num_bytes > MAX_UNKNOWN_BYTES:
        got = f"{num_bytes} bytes of unknown fields"
        raise InvalidRequest(
            message.DESCRIPTOR.name, got, f"only the fields of {message.DESCRIPTOR.full_name}"
        )


async def vet(message: Message, bounds: RequestBounds) -> None:
    """`refuse_unknown_fields` and `check_message`, for a loop."""
    for index, _ in enumerate(walk(message), 1):  # as `in_turns` does, which costs more than a small message
        if index % STEPS == 0:
            await asyncio.sleep(0)
    check_message(message, bounds)


def walk(message: Message) -> Iterator[None]:
    """`refuse_unknown_fields` in small steps, one for each part of the message."""
    yield from _counted(message, _walk(message, ""))


def _counted(message: Message, parts: Iterator[None]) -> Iterator[None]:
    for index, _ in enumerate(parts):
        if index >= MAX_PARTS:
            raise InvalidRequest(
                message.DESCRIPTOR.name, f"more than {MAX_PARTS} parts", f"at most {MAX_PARTS}"
            )
        yield


def _walk(message: Message, path: str, is_ours: bool = False) -> Iterator[None]:
    yield
    if not is_ours and len(unknown := UnknownFieldSet(message)):
        field = f"field {unknown[0].field_number}"
        raise InvalidRequest(
            path or message.DESCRIPTOR.name, field, f"only the fields of {message.DESCRIPTOR.full_name}"
        )
    for name, child in _children(message):
        yield from _walk(child, f"{path}.{name}" if path else name, is_ours)


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


def check_message(message: Message, bounds: RequestBounds) -> None:
    """Runs after `walk`: raises InvalidRequest or UnknownModel for errors that show before tokenisation, and
    makes a prompt of token ids as short as its client allows."""
    check_message_model(message, bounds)
    found = message_problems(message, bounds)
    if found and isinstance(message, pb.GenerateRequest):
        raise with_sampling(found, message.sampling, bounds.limits)
    refuse(found)
    keep_end(message, bounds)


def keep_end(message: Message, bounds: RequestBounds) -> None:
    """Drops the tokens of a prompt that its client lets us cut off, before there is work on each of them."""
    if isinstance(message, pb.GenerateRequest | pb.TokenizeRequest):
        prompt = message.prompt
        if prompt.HasField("truncate_tokens") and len(prompt.token_ids.ids) > bounds.max_prompt_tokens:
            del prompt.token_ids.ids[: -bounds.max_prompt_tokens]


def check_message_model(message: Message, bounds: RequestBounds) -> None:
    """Raises UnknownModel."""
    if isinstance(message, pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest):
        check_model(message.model, bounds.model)


def message_problems(message: Message, bounds: RequestBounds) -> list[InvalidRequest]:
    """Returns what is wrong in a message's names, and in the number and size of its parts."""
    match message:
        case pb.GenerateRequest(sampling=sampling):
            return [
                *_name_problems(message),
                *_prompt_problems(message.prompt, bounds),
                *count_problems(
                    bounds.limits,
                    num_biases=len(sampling.logit_bias),
                    num_stops=len(sampling.stop),
                    num_stop_token_ids=len(sampling.stop_token_ids),
                ),
                *_bad_word_problems(sampling.bad_words),
            ]
        case pb.TokenizeRequest():
            return _prompt_problems(message.prompt, bounds, is_counted=True)
        case pb.DetokenizeRequest() if len(message.token_ids) > bounds.max_model_len:
            got = f"{len(message.token_ids)} tokens"
            expected = f"at most {bounds.max_model_len} tokens, as many as the model takes"
            return [InvalidRequest("token_ids", got, expected)]
    return []


def check_model(name: str, served: str) -> None:
    if name and name != served:
        raise UnknownModel(name, served)


def _name_problems(message: pb.GenerateRequest) -> Iterator[InvalidRequest]:
    for name in ("request_id", "cache_salt", "client_id"):
        try:
            check_name(name, getattr(message, name))
        except InvalidRequest as error:
            yield error


def _prompt_problems(
    prompt: pb.Prompt, bounds: RequestBounds, is_counted: bool = False
) -> list[InvalidRequest]:
    """Returns what is wrong with a prompt before millions of its tokens are examined."""
    try:
        if prompt.HasField("token_ids") and is_counted:
            check_counted(len(prompt.token_ids.ids), bounds)
        elif prompt.HasField("token_ids") and not prompt.HasField("truncate_tokens"):
            check_prompt_length(len(prompt.token_ids.ids), bounds.limits, bounds.max_model_len)
        check_prompt_size(prompt, bounds)
    except InvalidRequest as error:
        return [error]
    return _chat_problems(prompt, bounds)


def _chat_problems(prompt: pb.Prompt, bounds: RequestBounds) -> list[InvalidRequest]:
    """Returns what is wrong with the options of a prompt, before any work is done for it."""
    found, most = [], bounds.max_prompt_tokens
    if prompt.HasField("truncate_tokens") and not (
        prompt.truncate_tokens == -1 or 1 <= prompt.truncate_tokens <= most
    ):
        found.append(InvalidRequest("prompt.truncate_tokens", prompt.truncate_tokens, f"-1, or 1 to {most}"))
    if not prompt.HasField("chat"):
        return found
    chat = prompt.chat
    if len(chat.template_kwargs) > MAX_TEMPLATE_KWARGS_CHARS:
        got, expected = f"{len(chat.template_kwargs)} characters", f"at most {MAX_TEMPLATE_KWARGS_CHARS}"
        found.append(InvalidRequest("prompt.chat.template_kwargs", got, expected))
    if chat.continue_final_message and chat.add_generation_prompt:
        expected = "false beside continue_final_message, whose turn stays open"
        found.append(InvalidRequest("prompt.chat.add_generation_prompt", True, expected))
    return found


def _bad_word_problems(words: Sequence[str]) -> Iterator[InvalidRequest]:
    if len(words) > MAX_BAD_WORDS:
        yield InvalidRequest("bad_words", f"{len(words)} texts", f"at most {MAX_BAD_WORDS}")
        return
    for index, word in enumerate(words):
        if not word.strip() or len(word) > MAX_BAD_WORD_CHARS:
            expected = f"a text of 1 to {MAX_BAD_WORD_CHARS} characters, not all of them blanks"
            yield InvalidRequest(f"bad_words[{index}]", word, expected)
            return


def check_prompt_size(prompt: pb.Prompt, bounds: RequestBounds) -> None:
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
        check_chars(_chat_chars(prompt.chat), bounds)


def _chat_chars(chat: pb.Chat) -> int:
    documents = sum(len(text) for document in chat.documents for text in document.fields.values())
    messages = sum(len(message.content) + len(message.reasoning_content) for message in chat.messages)
    return messages + documents


def check_chars(num_chars: int, bounds: RequestBounds) -> None:
    """Raises InvalidRequest for a text that is too long, however few tokens it has."""
    if num_chars > bounds.max_prompt_chars:
        why = f"{bounds.max_prompt_tokens} tokens of at most {bounds.max_token_chars} each"
        expected = f"at most {bounds.max_prompt_chars} characters ({why})"
        raise context_length_exceeded("prompt", f"{num_chars} characters", expected, bounds.max_context)


def check_counted(num_tokens: int, bounds: RequestBounds) -> None:
    """Raises InvalidRequest for more tokens than Tokenize counts."""
    if num_tokens > bounds.max_counted_tokens:
        expected = f"at most {bounds.max_counted_tokens} tokens, twice what a prompt may have"
        raise context_length_exceeded("prompt", f"{num_tokens} tokens", expected, bounds.max_context)
