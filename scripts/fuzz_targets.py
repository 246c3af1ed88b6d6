"""The targets of `scripts/fuzz`: bytes in, and only the intended refusals out.

validator   a client's message, as bytes or put together, through parsing, intake and its refusal
config      the text of a cluster.yaml, as `Apply` takes it
frames      the bytes that an unauthenticated peer sends to the router: handshake, then frames
"""

import asyncio
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pdserve"]):
    from pdserve.core.codec import FrameDecoder, FrameEncoder, FrameError
    from pdserve.core.config import LimitsSection
    from pdserve.core.config_file import parse_cluster_config
    from pdserve.core.errors import ConfigError, InvalidRequest
    from pdserve.core.handshake import (
        HandshakeAcceptor,
        HandshakeDialler,
        HandshakeError,
        HandshakeStream,
        Purpose,
    )
    from pdserve.core.messages import Hello, WorkerMessage
    from pdserve.gateway.app import model_info
    from pdserve.gateway.constraint import grammar_of
    from pdserve.gateway.intake import Intake, ModelInfo
    from pdserve.gateway.translate import MAX_MESSAGE_CHARS, UnknownModel, to_status

from google.protobuf.message import DecodeError

from pdserve.core.config import ClusterConfig
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.proto import pdserve_pb2 as pb

MAX_DETAILS_BYTES = 6 << 10  # beside the message, in headers of 8 KiB
LIMITS = LimitsSection()


class Unchecked:
    """Skips the check of grammars, which takes a process of its own."""

    async def grammar(self, message: pb.Constraint, client: str) -> str:
        return grammar_of(message)

    async def why_not(self, grammar: str, client: str) -> str | None:
        return None


class Validator:
    """Requests for the embedded model."""

    def __init__(self) -> None:
        self._info: ModelInfo = model_info(ClusterConfig())
        self._intake = Intake(Tokenizer.load(MODEL_DIR), self._info, Unchecked())
        self._loop = asyncio.new_event_loop()

    def seeds(self) -> list[bytes]:
        text = pb.GenerateRequest(
            prompt=pb.Prompt(text="def f"), sampling=pb.SamplingParams(max_tokens=3, stop=["a"])
        )
        ids = pb.GenerateRequest(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2])), request_id="r", resume_from=[1]
        )
        chat = pb.GenerateRequest(
            prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
        )
        json = pb.GenerateRequest(
            prompt=pb.Prompt(text="a"),
            sampling=pb.SamplingParams(constraint=pb.Constraint(json_schema='{"type": "object"}')),
        )
        tools = pb.GenerateRequest()
        tools.CopyFrom(chat)
        tools.prompt.chat.tools.add(name="f", parameters='{"type": "object"}')
        return [b"\x00" + message.SerializeToString() for message in (text, ids, chat, json, tools)] + [
            b"\x01" + bytes(range(200))
        ]

    def __call__(self, data: bytes) -> None:
        message = _made(atheris.FuzzedDataProvider(data[1:])) if data[:1] == b"\x01" else _parsed(data[1:])
        if message is None:
            return
        try:
            request = self._loop.run_until_complete(self._intake.request(message, LIMITS, None, "peer"))
        except (InvalidRequest, UnknownModel) as error:
            _check_refusal(error)
            return
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        assert (
            1 <= sampling.n <= LIMITS.max_n
            and 0 < num_prompt + sampling.max_tokens <= self._info.max_model_len
        )
        assert all(
            0 <= token < self._info.vocab_size for token in request.prompt_token_ids + sampling.stop_token_ids
        )
        assert request.request_id.isprintable() and request.client.isprintable()


def _check_refusal(error: InvalidRequest | UnknownModel) -> None:
    code, details = to_status(error)
    assert code.name in ("INVALID_ARGUMENT", "NOT_FOUND"), code
    assert len(str(error)) <= MAX_MESSAGE_CHARS or isinstance(error, UnknownModel), error
    assert str(error).isprintable(), error
    assert sum(detail.ByteSize() for detail in details) <= MAX_DETAILS_BYTES, error


def _parsed(data: bytes) -> pb.GenerateRequest | None:
    message = pb.GenerateRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    return message


def _made(draw: atheris.FuzzedDataProvider) -> pb.GenerateRequest:
    """Fields of the right kinds with any values: random bytes rarely set many at once."""
    message = pb.GenerateRequest()
    match draw.ConsumeIntInRange(0, 2):
        case 0:
            message.prompt.text = _text(draw)
        case 1:
            message.prompt.token_ids.ids.extend(
                draw.ConsumeIntInRange(0, 2**32 - 1) for _ in range(draw.ConsumeIntInRange(0, 9))
            )
        case _:
            for _ in range(draw.ConsumeIntInRange(0, 3)):
                _add_message(message.prompt.chat, draw)
            for _ in range(draw.ConsumeIntInRange(0, 2)):
                message.prompt.chat.tools.add(
                    name=_text(draw), description=_text(draw), parameters=_json(draw)
                )
            if draw.ConsumeBool():
                message.prompt.chat.tool_choice.function = _text(draw)
    message.request_id, message.client_id, message.cache_salt = _text(draw), _text(draw), _text(draw)
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if field.name not in ("constraint", "logit_bias") and draw.ConsumeBool():
            _set(message.sampling, field, draw)
    for _ in range(draw.ConsumeIntInRange(0, 2)):
        message.sampling.logit_bias[draw.ConsumeIntInRange(0, 2**32 - 1)] = draw.ConsumeFloat()
    if draw.ConsumeBool():
        _constrain(message.sampling.constraint, draw)
    message.resume_from.extend(
        draw.ConsumeIntInRange(0, 2**31 - 1) for _ in range(draw.ConsumeIntInRange(0, 2))
    )
    return message


def _set(sampling: pb.SamplingParams, field: object, draw: atheris.FuzzedDataProvider) -> None:
    """Any value of the field's type; what the type itself refuses is left out."""
    name, is_list = field.name, field.is_repeated
    for value in (draw.ConsumeInt(9), draw.ConsumeFloat(), draw.ConsumeBool(), _text(draw)):
        try:
            if is_list:
                getattr(sampling, name).append(value)
            else:
                setattr(sampling, name, value)
        except (TypeError, ValueError, OverflowError):
            continue
        return


def _add_message(chat: pb.Chat, draw: atheris.FuzzedDataProvider) -> None:
    added = chat.messages.add(
        role=_text(draw), content=_text(draw), tool_call_id=_text(draw), name=_text(draw)
    )
    if draw.ConsumeBool():
        added.tool_calls.add(id=_text(draw), name=_text(draw), arguments=_json(draw))


def _json(draw: atheris.FuzzedDataProvider) -> str:
    return draw.PickValueInList(
        [_text(draw), '{"a": 1}', '{"type": "object"}', "[" * 300, '{"a":' * 150 + "1" + "}" * 150]
    )


def _constrain(constraint: pb.Constraint, draw: atheris.FuzzedDataProvider) -> None:
    kind = draw.PickValueInList(["json_object", "json_schema", "regex", "grammar", "choice"])
    if kind == "json_object":
        constraint.json_object = draw.ConsumeBool()
    elif kind == "choice":
        constraint.choice.texts.extend(_text(draw) for _ in range(draw.ConsumeIntInRange(0, 3)))
    else:
        setattr(constraint, kind, _text(draw))


def _text(draw: atheris.FuzzedDataProvider) -> str:
    return draw.ConsumeUnicodeNoSurrogates(draw.ConsumeIntInRange(0, 40))


class Config:
    """The text of a cluster.yaml."""

    def seeds(self) -> list[bytes]:
        return [
            Path("cluster.yaml").read_bytes()[:3000],
            b"metadata: {pdserve: {pools: {decode: {instances: -1}}}}",
        ]

    def __call__(self, data: bytes) -> None:
        try:
            parse_cluster_config(data.decode("utf-8", "replace"))
        except ConfigError as error:
            _check_lines(str(error))


def _check_lines(text: str) -> None:
    assert text.startswith("cluster.yaml:"), text


class Frames:
    """A peer that knows the token, or does not, and says anything."""

    def seeds(self) -> list[bytes]:
        hello = FrameEncoder().encode(Hello(worker_id="w", incarnation=1))
        return [
            b"\x00" + HandshakeDialler("t", Purpose.CONTROL).opening,
            b"\x01" + hello,
            b"\x01\x00\x00\x00\x00\x00\x00\x00\x00",
        ]

    def __call__(self, data: bytes) -> None:
        try:
            if data[:1] == b"\x00":
                stream = HandshakeStream(HandshakeAcceptor("t", Purpose.CONTROL))
                for start in range(1, len(data), 7):
                    assert stream.feed(data[start : start + 7])[1] == b"", (
                        "an unauthenticated peer came through"
                    )
            else:
                list(FrameDecoder(WorkerMessage).feed(data[1:]))
        except (FrameError, HandshakeError):
            pass


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[2])
    run = {"validator": Validator, "config": Config, "frames": Frames}[target]()
    for number, seed in enumerate(run.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
