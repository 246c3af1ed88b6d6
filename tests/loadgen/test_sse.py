"""However a stream of events is cut, the same events come out."""

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.loadgen.sse import SseParser

TEXT = (
    'data: {"text": "Grüße 🙂"}\n\n: a comment\r\n\r\nevent: x\nid: 7\ndata:first\ndata: '
    " second\r\rdata\n\ndata: [DONE]\n\n"
)
EVENTS = ['{"text": "Grüße 🙂"}', "first\n second", "", "[DONE]"]


def parse(pieces: list[bytes]) -> list[str]:
    parser = SseParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    last = parser.finish()
    return events if last is None else [*events, last]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TEXT.encode())), max_size=40), st.booleans())
def test_events_do_not_depend_on_how_they_were_cut(cuts: list[int], has_mark: bool) -> None:
    data = (b"\xef\xbb\xbf" if has_mark else b"") + TEXT.encode()
    edges = [0, *sorted(cuts), len(data)]
    assert parse([data[start:end] for start, end in pairwise(edges)]) == EVENTS


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_is_one(newline: str) -> None:
    data = "data: a\n\ndata: b\ndata: c\n\n".replace("\n", newline).encode()
    assert parse([data[index : index + 1] for index in range(len(data))]) == ["a", "b\nc"]


@pytest.mark.parametrize("end", ["data: [DONE]", "data: [DONE]\n"])
def test_a_last_event_without_its_blank_line_is_heard(end: str) -> None:
    assert parse([b"data: 1\n\n", end.encode()]) == ["1", "[DONE]"]
