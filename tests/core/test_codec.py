"""Frames survive any cut of the stream; what is no frame ends it."""

import struct

import pytest
from hypothesis import given, strategies as st

from pdserve.core.codec import FrameDecoder, FrameError, encode_frame
from pdserve.core.messages import Abort, Hello, LoadProgress, StepReport, TokenOutput, WorkerCommand, WorkerLoad, WorkerMessage
from pdserve.core.request import FinishReason, TransferId

MESSAGES = [
    Hello(worker_id="decode-0", incarnation=3, token="t"),
    LoadProgress(worker_id="decode-0", incarnation=3, phase="loading weights", fraction=0.5),
    StepReport(
        worker_id="decode-0",
        incarnation=3,
        load=WorkerLoad(num_running=2),
        outputs=(TokenOutput(TransferId("r", 1), 0, 7, 42, FinishReason.STOP, -0.25, ((42, -0.25), (7, -1.5))),),
        blocks_added=(b"\x00" * 16,),
    ),
]


@given(st.lists(st.integers(1, 50), max_size=60))
def test_messages_survive_any_cut_of_the_stream(cuts: list[int]) -> None:
    data = b"".join(map(encode_frame, MESSAGES))
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    received = []
    for size in [*cuts, len(data)]:
        received += list(decoder.feed(data[:size]))
        data = data[size:]
    assert received == MESSAGES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", 1 << 30), "at most"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "malformed"),
        (encode_frame(Abort(transfer=TransferId("r", 0))), "malformed"),  # a command is no report
    ],
)
def test_what_is_no_frame_of_the_protocol_is_refused(data: bytes, message: str) -> None:
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    with pytest.raises(FrameError, match=message):
        list(decoder.feed(data))


def test_frames_before_a_broken_one_are_delivered() -> None:
    decoder: FrameDecoder[WorkerCommand] = FrameDecoder(WorkerCommand)
    abort = Abort(transfer=TransferId("r", 0))
    frames = decoder.feed(encode_frame(abort) + struct.pack("<I", 1) + b"\xc1")
    assert next(frames) == abort
    with pytest.raises(FrameError):
        next(frames)
