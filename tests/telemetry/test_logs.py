"""Log lines: a record is one line whatever is in it, and a logging process never waits."""

import contextlib
import io
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.core.log_settings import LogFormat, LogSettings
from pdserve.telemetry.logs import (
    REQUEST_ID,
    ConsoleFormatter,
    JsonFormatter,
    are_json,
    configured,
    printable,
)
from pdserve.telemetry.relay import LogRelay, RelayHandler

FORGED = (
    'r1\n{"level": "error", "message": "forged"}\r\n2026-01-01T00:00:00.000Z error head:'
    " forged\x1b[2J\u2028\u202e\x00"
)


def record(message: str = "%s happened", *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord(
        "pdserve.router.service", logging.WARNING, __file__, 1, message, args or ("it",), None
    )
    made.__dict__.update(fields)
    return made


def failed(text: str) -> logging.LogRecord:
    try:
        raise ValueError(text)
    except ValueError as error:
        made = record()
        made.exc_info = type(error), error, error.__traceback__
        return made


def test_a_json_line_has_the_fields_of_its_record() -> None:
    line = json.loads(JsonFormatter("head").format(record(request_id="r1", attempt=3, worker="decode-0")))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "process": "head",
        "logger": "pdserve.router.service",
        "message": "it happened",
        "request_id": "r1",
        "attempt": 3,
        "worker": "decode-0",
    }


def test_a_console_line_reads_from_time_to_fields() -> None:
    line = ConsoleFormatter("head").format(record(request_id="r1", attempt=3))
    assert line.partition(" ")[2] == "warning head router.service: it happened request_id=r1 attempt=3"


@pytest.mark.parametrize("formatter", [JsonFormatter("head"), ConsoleFormatter("head")])
@given(st.text() | st.just(FORGED))
def test_no_name_that_a_client_chooses_makes_a_second_line(formatter: logging.Formatter, text: str) -> None:
    line = formatter.format(record("%s", text, request_id=text))
    assert line.splitlines() == [line]
    assert line.isprintable()


@given(st.text() | st.just(FORGED))
def test_escaped_characters_survive_a_json_line(text: str) -> None:
    line = json.loads(JsonFormatter("head").format(record("%s", text, request_id=text)))
    assert (line["message"], line["request_id"]) == (text, text)


def test_a_field_of_a_console_line_cannot_look_like_another() -> None:
    line = ConsoleFormatter("head").format(record(request_id='r1 worker=decode-9 "'))
    assert line.endswith('request_id="r1 worker=decode-9 \\""')


def test_an_exception_stays_in_its_record() -> None:
    line = JsonFormatter("head").format(failed(FORGED))
    assert line.splitlines() == [line]
    assert "ValueError" in json.loads(line)["exception"]
    first, *story = ConsoleFormatter("head").format(failed(FORGED)).splitlines()
    assert first.endswith("it happened")
    assert len(story) > 3
    assert all(line.startswith("    | ") and line.isprintable() for line in story)


def test_a_long_record_is_cut_and_is_json_still() -> None:
    line = JsonFormatter("head").format(failed("\U0001f600" * 100_000))
    assert len(json.loads(line)["exception"]) <= 8192
    assert len(JsonFormatter("head").format(record("%s", "\U0001f600" * 100_000))) < 60_000


def test_printable_text_stays_as_it_is() -> None:
    assert printable("Grüße, 世界") == "Grüße, 世界"
    assert printable("a\tb\ud800") == "a\\tb\\ud800"


def test_a_record_made_during_a_call_has_its_request_id() -> None:
    token = REQUEST_ID.set("r9")
    try:
        assert json.loads(JsonFormatter("head").format(record()))["request_id"] == "r9"
        assert json.loads(JsonFormatter("head").format(record(request_id="r1")))["request_id"] == "r1"
    finally:
        REQUEST_ID.reset(token)


class ScreenText(io.StringIO):
    """The output of the process that shows the lines."""

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


@pytest.fixture
def relay() -> Iterator[Callable[..., tuple[LogRelay, ScreenText]]]:
    relays: list[LogRelay] = []

    def make() -> tuple[LogRelay, ScreenText]:
        screen = ScreenText()
        relays.append(LogRelay(screen))
        return relays[-1], screen

    yield make
    for made in relays:
        made.close()


def test_the_launcher_shows_whole_lines_of_all_processes(relay: Any) -> None:
    made, screen = relay()
    handlers = [RelayHandler(made.path) for _ in range(3)]
    for number in range(30):
        handlers[number % 3].handle(record("line %d", number))
    for handler in handlers:
        handler.close()
    made.close()
    assert sorted(screen.lines()) == sorted(f"line {number}" for number in range(30))


def drain(reader: socket.socket) -> None:
    """Read all that is there."""
    reader.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while reader.recv(1 << 18):
            pass


def test_a_logging_process_does_not_wait_for_the_displaying_one(tmp_path: Any) -> None:
    path = str(tmp_path / "lines")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        handler = RelayHandler(path)
        reader, _ = listener.accept()
        while not handler.num_dropped:  # nobody reads
            handler.handle(record("%s", "x" * 1000))
        handler.handle(record("%s", "lost"))
        assert handler.num_dropped == 2
        drain(reader)
        handler.handle(record("%s", "back"))
        assert [reader.recv(1 << 18) for _ in range(2)] == [b"2 lines were dropped", b"back"]
        reader.close()
    handler.handle(record("%s", "nobody is there"))
    assert handler.num_dropped == 1
    handler.close()


@pytest.mark.parametrize(("kind", "is_json"), [("json", True), ("console", False)])
def test_a_process_logs_from_its_level_until_the_block_ends(
    kind: LogFormat, is_json: bool, relay: Any
) -> None:
    made, screen = relay()
    before = logging.getLogger().handlers[:]
    with configured(LogSettings(kind, "info", made.path), "up"):
        assert are_json() is is_json
        logging.getLogger("pdserve.some").info("heard")
        logging.getLogger("pdserve.some").debug("too quiet")
        logging.getLogger("other").info("not ours")
        logging.getLogger("other").warning("theirs")
    made.close()
    assert logging.getLogger().handlers == before
    assert [
        word
        for line in screen.lines()
        for word in ("heard", "too quiet", "not ours", "theirs")
        if word in line
    ] == [
        "heard",
        "theirs",
    ]


def test_where_nobody_shows_lines_they_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(LogSettings("json", "info", "/nowhere/lines"), "decode-0/1"):
        logging.getLogger("pdserve.some").warning("alone")
    assert json.loads(capsys.readouterr().err)["process"] == "decode-0/1"


def test_lines_of_libraries_that_connections_cause_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with configured(LogSettings(), "head"):
        for _ in range(1000):
            logging.getLogger("asyncio").error("socket.accept() out of system resource")
    assert len(stream.getvalue().splitlines()) < 100
