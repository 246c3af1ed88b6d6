"""Frames survive any fragmentation of the stream; an invalid frame ends it."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from pdserve.core.codec import FrameDecoder, FrameEncoder, FrameError
from pdserve.core.messages import (
    Abort,
    Hello,
    LoadProgress,
    StepReport,
    TokenOutput,
    WorkerCommand,
    WorkerLoad,
    WorkerMessage,
)
from pdserve.core.request import FinishReason, TransferId

MESSAGES = [
    Hello(worker_id="decode-0", incarnation=3),
    LoadProgress(worker_id="decode-0", incarnation=3, phase="loading weights", fraction=0.5),
    StepReport(
        worker_id="decode-0",
        incarnation=3,
        load=WorkerLoad(num_running=2),
        outputs=(
            TokenOutput(TransferId("r", 1), 0, 7, 42, FinishReason.STOP, -0.25, ((42, -0.25), (7, -1.5))),
        ),
        blocks_added=(b"\x00" * 16,),
    ),
]


def frames(messages: Sequence[object]) -> bytes:
    return b"".join(map(FrameEncoder().encode, messages))


@given(st.lists(st.integers(1, 50), max_size=60))
def test_messages_survive_any_cut_of_the_stream(cuts: list[int]) -> None:
    data = frames(MESSAGES)
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    received = []
    for size in [*cuts, len(data)]:
        received += list(decoder.feed(data[:size]))
        data = data[size:]
    assert received == MESSAGES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<II", 1 << 30, 0), "at most"),
        (struct.pack("<II", 3, 0) + b"\xc1\xc1\xc1", "malformed"),
        (frames(MESSAGES[:1]).replace(b"decode-0", b"decode-\xff"), "malformed"),  # no UTF-8
        (frames([Abort(transfer=TransferId("r", 0))]), "malformed"),  # a command is no report
    ],
)
def test_an_invalid_frame_is_refused(data: bytes, message: str) -> None:
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    with pytest.raises(FrameError, match=message):
        list(decoder.feed(data))


def test_frames_before_a_broken_one_are_delivered() -> None:
    decoder: FrameDecoder[WorkerCommand] = FrameDecoder(WorkerCommand)
    abort = Abort(transfer=TransferId("r", 0))
    messages = decoder.feed(frames([abort]) + struct.pack("<II", 1, 1) + b"\xc1")
    assert next(messages) == abort
    with pytest.raises(FrameError):
        next(messages)


@pytest.mark.parametrize("order", [[0, 2], [0, 0], [1, 0], [0, 1, 1]])
def test_a_stream_that_lost_repeated_or_swapped_a_frame_is_broken(order: list[int]) -> None:
    encoder = FrameEncoder()
    encoded = [encoder.encode(message) for message in MESSAGES]
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    with pytest.raises(FrameError, match="was due"):
        list(decoder.feed(b"".join(encoded[index] for index in order)))
