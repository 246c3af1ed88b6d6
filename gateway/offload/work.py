"""The work of the intake process. Pure: bytes in, bytes out, or the error that the head would have raised."""

import sys
from array import array
from collections.abc import Sequence

import msgspec
from google.protobuf.message import DecodeError, Message

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..http.bodies import read_body
from ..text.chat_template import ChatTemplates
from ..text.encoding import bounded_ids, chat_text
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_loading.messages import TemplateData, TokenizerData
from ..tools.offer import OfferedTools
from ..vetting import (
    MAX_UNKNOWN_BYTES,
    RequestBounds,
    check_message,
    check_unknown_bytes,
    refuse_unknown_fields,
)
from .messages import Decode, Encode, EncodeChat, IntakeJob, IntakeSetup, ReadBody, ReadMessage, RenderChat

TURN_S = 0.1  # of processor time for a short conversation; others wait for it
WIRE_FORMAT = "the call's message in protobuf's wire format, with texts in UTF-8"


class IntakeWorker:
    """Carries out jobs for one model."""

    def __init__(self, setup: IntakeSetup, tokenizer: bytes) -> None:
        self._tokenizer = Tokenizer(msgspec.msgpack.decode(tokenizer, type=TokenizerData))
        self._tokenizer.templates.compile()
        self._setup = setup

    def do(self, job: IntakeJob, data: bytes) -> tuple[Sequence[bytes], bytes]:
        """Returns the results and their metadata. Raises InvalidRequest or UnknownModel."""
        bounds = RequestBounds(
            limits=LimitsSection.model_validate_json(job.limits),
            model=self._setup.model,
            max_model_len=self._setup.max_model_len,
            max_token_chars=self._tokenizer.max_token_chars,
        )
        match job.work:
            case Encode(add_special_tokens=add, fit=fit):
                return [packed(bounded_ids(self._tokenizer, data.decode(), add, bounds, fit))], b""
            case EncodeChat(fit=fit):
                chat = pb.Chat.FromString(data)
                text = chat_text(self._tokenizer.templates, chat, OfferedTools.read(chat, bounds.limits))
                return [packed(bounded_ids(self._tokenizer, text, False, bounds, fit))], b""
            case Decode(skip_special_tokens=skip):
                return [self._tokenizer.decode(unpacked(data), skip_special_tokens=skip).encode()], b""
            case ReadBody(route=route, request_id=request_id, is_id_given=is_given):
                messages, asked = read_body(route, data, request_id, bounds, is_id_given=is_given)
                return [message.SerializeToString() for message in messages], msgspec.msgpack.encode(asked)
            case ReadMessage(name=name):
                kind: type[Message] = getattr(pb, name)
                return [read_message(kind, data, bounds).SerializeToString()], b""
        raise ValueError(f"{job.work} is not for this process")


class TemplateWorker:
    """Renders short conversations for one model."""

    def __init__(self, data: bytes) -> None:
        self._templates = ChatTemplates(msgspec.msgpack.decode(data, type=TemplateData))
        self._templates.compile()

    def do(self, job: IntakeJob, data: bytes) -> tuple[Sequence[bytes], bytes]:
        """As `IntakeWorker.do`."""
        assert isinstance(job.work, RenderChat), job.work
        chat = pb.Chat.FromString(data)
        offer = OfferedTools.read(chat, LimitsSection.model_validate_json(job.limits))
        return [chat_text(self._templates, chat, offer, TURN_S).encode()], b""


def read_message(kind: type[Message], data: bytes, bounds: RequestBounds) -> Message:
    """Raises InvalidRequest for data that is not a message of the kind, InvalidRequest or UnknownModel for an
    invalid message."""
    message = parsed(kind, data)
    refuse_unknown_fields(message)
    check_message(message, bounds)
    return message


def parsed(kind: type[Message], data: bytes) -> Message:
    """Raises InvalidRequest."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise InvalidRequest("message", f"{len(data)} bytes", WIRE_FORMAT) from None
    if len(data) > MAX_UNKNOWN_BYTES:
        check_unknown_bytes(message)
    return message


def packed(token_ids: Sequence[int]) -> bytes:
    """Packs token ids as little-endian integers of 32 bits."""
    values = array("I", token_ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpacked(data: bytes) -> tuple[int, ...]:
    """The reverse of `packed`."""
    values = array("I", data)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)
