"""The protocol of the intake process, in frames (`core.codec`). It has one job at a time.

Setup(size), Part...    ---->   once, before all others: the tokenizer, or the chat templates alone
                        <---- Done()
Job(work, size), Part... ---->
                        <---- Done(sizes), Part..., or Refused(why)

Texts and messages are sent in parts, so that the head never copies much at once.
"""

from collections.abc import Iterator

import msgspec

from ..vetting import Fit

PART_BYTES = 1 << 18


class IntakeSetup(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model that prompts are for. Its parts: `TokenizerData`."""

    size: int
    model: str
    max_model_len: int


class TemplateSetup(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """For a process that only renders short conversations. Its parts: `TemplateData`."""

    size: int


class Encode(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Encodes a text to token ids, packed as little-endian integers of 32 bits."""

    add_special_tokens: bool
    fit: Fit


class EncodeChat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Renders and encodes a `pb.Chat` to token ids."""

    fit: Fit


class RenderChat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Renders a short `pb.Chat` to text."""


class Decode(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Decodes packed token ids to text."""

    skip_special_tokens: bool


class ReadBody(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Reads the body of an HTTP request as one or more messages."""

    route: str
    request_id: str
    is_id_given: bool = True


class ReadMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Reads a gRPC message and serialises it as compactly as possible: fields that are overwritten later are
    gone."""

    name: str


Work = Encode | EncodeChat | RenderChat | Decode | ReadBody | ReadMessage


class IntakeJob(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A job within the limits in force; its parts have `size` bytes."""

    work: Work
    limits: bytes  # `LimitsSection` in JSON
    size: int


class DataPart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The next bytes."""

    data: bytes


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The results, one after the other in the parts that follow; `rest` holds their metadata."""

    sizes: tuple[int, ...]
    rest: bytes = b""


class JobRefused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The error that the work raised: `InvalidRequest` of a field, `TooCostly` as one, or `UnknownModel`."""

    problems: tuple[tuple[str, str, str], ...] = ()  # as in `Problem`
    reason: str = ""
    is_too_costly: bool = False
    unknown_model: tuple[str, str] | None = None  # requested and served


ToProcess = IntakeSetup | TemplateSetup | IntakeJob | DataPart
FromProcess = Done | JobRefused | DataPart


def parts(data: bytes) -> Iterator[DataPart]:
    """All of `data`."""
    view = memoryview(data)
    for start in range(0, len(view), PART_BYTES):
        yield DataPart(bytes(view[start : start + PART_BYTES]))
