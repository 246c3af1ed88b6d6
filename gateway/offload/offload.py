"""The head's side of the intake process and of the one that renders short conversations, with a method for
each kind of work. Also owns the threads for smaller work."""

from collections.abc import Sequence

import msgspec
from google.protobuf.message import Message

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..http.answer_options import AnswerOptions
from ..http.bodies import MESSAGES, SMALL_BYTES as SMALL_BYTES, is_small, read_body
from ..in_turns import in_turns
from ..text.tokenizer import Tokenizer
from ..vetting import Fit, RequestBounds, vet
from .fair_threads import MAX_JOBS, MAX_JOBS_EACH, FairThreads
from .messages import (
    Decode,
    Encode,
    EncodeChat,
    IntakeJob,
    IntakeSetup,
    ReadBody,
    ReadMessage,
    RenderChat,
    TemplateSetup,
    Work,
)
from .process import IntakeProcess
from .work import packed, parsed, unpacked


class Offload:
    """Used on one asyncio loop. Each process starts with its first job, or by `start`."""

    def __init__(self, tokenizer: Tokenizer, model: str, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._max_model_len = max_model_len
        self._intake = IntakeProcess(self._setup)
        self.renderer = IntakeProcess(self._template_setup, MAX_JOBS, MAX_JOBS_EACH)
        self.threads = FairThreads()

    @property
    def pid(self) -> int | None:
        """The process id of the intake process, if it is running."""
        return self._intake.pid

    def bounds(self, limits: LimitsSection) -> RequestBounds:
        """Returns the bounds of a request to the model, within the limits in force."""
        return RequestBounds(
            limits=limits,
            model=self._model,
            max_model_len=self._max_model_len,
            max_token_chars=self._tokenizer.max_token_chars,
        )

    def start(self) -> None:
        """Starts the processes ahead of the first jobs, so that these do not wait for them."""
        self._intake.need()
        if self._tokenizer.templates.can_render:
            self.renderer.need()

    async def stop(self) -> None:
        """Ends the processes and the threads; idempotent."""
        await self._intake.stop()
        await self.renderer.stop()
        await self.threads.stop()

    async def body(
        self,
        route: str,
        data: bytes,
        request_id: str,
        limits: LimitsSection,
        client: str,
        *,
        is_id_given: bool = True,
    ) -> tuple[Sequence[Message], AnswerOptions]:
        """Like `bodies.read_body`. All methods also raise QueueFull or NoWorkerAvailable, and InvalidRequest
        for input that takes too many resources."""
        if is_small(data):
            return read_body(route, data, request_id, self.bounds(limits), is_id_given=is_id_given)
        results, rest = await self._do(ReadBody(route, request_id, is_id_given), data, limits, client)
        messages = [MESSAGES[route].FromString(result) async for result in in_turns(results, every=1)]
        return messages, msgspec.msgpack.decode(rest, type=AnswerOptions)

    async def message(self, kind: type[Message], data: bytes, limits: LimitsSection, client: str) -> Message:
        """Returns a client's message, parsed and, if its type is ours, vetted. Raises InvalidRequest or
        UnknownModel."""
        if kind.DESCRIPTOR.file.package != pb.DESCRIPTOR.package:  # of a health check
            if len(data) > SMALL_BYTES:
                raise InvalidRequest("message", f"{len(data)} bytes", f"at most {SMALL_BYTES} bytes")
            return parsed(kind, data)
        if len(data) > SMALL_BYTES:
            (data,), _ = await self._do(ReadMessage(kind.DESCRIPTOR.name), data, limits, client)
            return kind.FromString(data)
        message = parsed(kind, data)
        await vet(message, self.bounds(limits))
        return message

    async def encode(
        self, text: str, add_special_tokens: bool, limits: LimitsSection, client: str, fit: Fit
    ) -> tuple[int, ...]:
        """Like `encoding.bounded_ids`."""
        work = Encode(add_special_tokens, fit)
        (ids,), _ = await self._do(work, text.encode(), limits, client)
        return unpacked(ids)

    async def render(self, chat: pb.Chat, limits: LimitsSection, client: str) -> str:
        """Renders a short conversation with the template. Raises TooCostly if it takes long."""
        (text,), _ = await self.renderer.do(*_job(RenderChat(), chat.SerializeToString(), limits), client)
        return text.decode()

    async def encode_chat(
        self, chat: pb.Chat, limits: LimitsSection, client: str, fit: Fit
    ) -> tuple[int, ...]:
        """Renders a conversation with the template, and then works like `encoding.bounded_ids`."""
        (ids,), _ = await self._do(EncodeChat(fit), chat.SerializeToString(), limits, client)
        return unpacked(ids)

    async def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool, limits: LimitsSection, client: str
    ) -> str:
        """Like `Tokenizer.decode`."""
        (text,), _ = await self._do(Decode(skip_special_tokens), packed(token_ids), limits, client)
        return text.decode()

    async def _do(
        self, work: Work, data: bytes, limits: LimitsSection, client: str
    ) -> tuple[list[bytes], bytes]:
        return await self._intake.do(*_job(work, data, limits), client)

    def _setup(self) -> tuple[IntakeSetup, bytes]:
        tokenizer = msgspec.msgpack.encode(self._tokenizer.data)
        return IntakeSetup(
            size=len(tokenizer), model=self._model, max_model_len=self._max_model_len
        ), tokenizer

    def _template_setup(self) -> tuple[TemplateSetup, bytes]:
        templates = msgspec.msgpack.encode(self._tokenizer.data.templates)
        return TemplateSetup(len(templates)), templates


def _job(work: Work, data: bytes, limits: LimitsSection) -> tuple[IntakeJob, bytes]:
    return IntakeJob(work, limits.model_dump_json().encode(), len(data)), data
