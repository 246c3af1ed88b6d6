"""From a client's message to a validated `Request`: nothing goes on to the router that a worker could not carry out."""

import asyncio
import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ..core.config import LimitsSection
from ..core.errors import InvalidRequest
from ..core.request import Request, SamplingParams
from ..core.validation import validate_request
from ..proto import pdserve_pb2 as pb
from .tokenizer import Tokenizer
from .translate import UnknownModel

MAX_NAME_CHARS = 128
MAX_STOP_CHARS = 1024
INLINE_CHARS = 4096  # longer prompts are encoded on a thread, so that other streams go on


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What clients may know of the model."""

    name: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Intake:
    """Reads requests for one model."""

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._model = model

    async def request(
        self,
        message: pb.GenerateRequest,
        limits: LimitsSection,
        deadline_s: float | None,
        peer: str,
        *,
        fills: bool = False,
    ) -> Request:
        """The request that `message` asks for; `peer` is the connection it came by. `fills`: without `max_tokens` it may use
        all the room that there is. Raises InvalidRequest or UnknownModel."""
        refuse_unknown_fields(message)
        self.check_model(message.model)
        check_name("request_id", message.request_id)
        check_name("cache_salt", message.cache_salt)
        check_name("client_id", message.client_id)
        request_id = message.request_id or uuid.uuid4().hex
        sampling = sampling_params(message.sampling, default_seed=_seed_of(request_id))
        _check_resumption(message, sampling)
        token_ids = await self.token_ids(message.prompt)
        if fills and not message.sampling.HasField("max_tokens"):
            room = min(limits.max_tokens, self._model.max_model_len - len(token_ids))
            sampling = msgspec.structs.replace(sampling, max_tokens=max(1, room))
        validate_request(token_ids, sampling, limits, self._model.max_model_len, self._model.vocab_size)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            eos_token_ids=self._model.eos_token_ids,
            cache_salt=message.cache_salt,
            deadline_s=deadline_s,
            client=f"id:{message.client_id}" if message.client_id else peer,
        )

    def check_model(self, name: str) -> None:
        if name and name != self._model.name:
            raise UnknownModel(name, self._model.name)

    async def token_ids(self, prompt: pb.Prompt) -> tuple[int, ...]:
        """The tokens of a prompt of any kind."""
        match prompt.WhichOneof("kind"):
            case "text":
                if not prompt.text:
                    raise InvalidRequest("prompt.text", prompt.text, "a text that is not empty")
                add = prompt.add_special_tokens if prompt.HasField("add_special_tokens") else True
                return await self._encode(prompt.text, add)
            case "chat":
                return await asyncio.to_thread(self._encode_chat, prompt.chat)
            case "token_ids":
                return tuple(prompt.token_ids.ids)
        raise InvalidRequest("prompt", "", "one of text, chat or token_ids")

    async def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    def _encode_chat(self, chat: pb.Chat) -> tuple[int, ...]:
        """On a thread of its own: a template may take its time."""
        if not chat.messages:
            raise InvalidRequest("prompt.chat.messages", [], "at least one message")
        for index, message in enumerate(chat.messages):
            if not message.role:
                raise InvalidRequest(f"prompt.chat.messages[{index}].role", "", "a role such as user")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        add = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        return self._tokenizer.encode(self._tokenizer.render_chat(messages, add), add_special_tokens=False)


def sampling_params(message: pb.SamplingParams, default_seed: int) -> SamplingParams:
    """The parameters as set, with defaults for the rest. Ranges are for `validate_request`."""
    values = {descriptor.name: value for descriptor, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values.get(name, ()))
    for index, text in enumerate(values["stop"]):
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(f"stop[{index}]", text, f"at most {MAX_STOP_CHARS} characters")
    values.setdefault("seed", default_seed)
    return SamplingParams(**values)


def _seed_of(request_id: str) -> int:
    """A client that comes back for the rest of its stream needs no more than the name of its request."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _check_resumption(message: pb.GenerateRequest, sampling: SamplingParams) -> None:
    if not message.resume_from:
        return
    if not message.request_id:
        raise InvalidRequest("request_id", "", "the name of the request to resume")
    if len(message.resume_from) != sampling.n:
        raise InvalidRequest("resume_from", list(message.resume_from), f"one index for each of the {sampling.n} choices")
    for choice, index in enumerate(message.resume_from):
        if not 0 <= index <= sampling.max_tokens:
            raise InvalidRequest(f"resume_from[{choice}]", index, f"0 to {sampling.max_tokens}")


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raises InvalidRequest when a client, newer than us or mistaken, sent fields that would otherwise be ignored."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        field = f"field {unknown[0].field_number}"
        raise InvalidRequest(path or message.DESCRIPTOR.name, field, f"only the fields of {message.DESCRIPTOR.full_name}")
    for name, child in _children(message):
        refuse_unknown_fields(child, f"{path}.{name}" if path else name)


def _children(message: Message) -> Iterator[tuple[str, Message]]:
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if isinstance(value, Message):
            yield descriptor.name, value
        else:
            yield from ((f"{descriptor.name}[{index}]", item) for index, item in enumerate(value))


def check_name(field: str, value: str) -> None:
    if len(value) > MAX_NAME_CHARS:
        raise InvalidRequest(field, value, f"at most {MAX_NAME_CHARS} characters")
