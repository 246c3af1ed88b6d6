"""Log lines: JSON for machines, text for terminals, one line a record whatever is in it.

Names that clients choose end up in log lines; nothing in them can begin a line of its own or move a
terminal's cursor."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..core.log_settings import LogSettings
from ..core.peer_log import limit_third_party_lines
from .relay import RelayHandler

MAX_MESSAGE_CHARS = 4096
MAX_EXCEPTION_CHARS = 8192  # its end says most
FIELDS = (  # the keys that a record may carry as `extra`; from `client` on, those of `telemetry.request_log`
    "request_id",
    "attempt",
    "worker",
    "client",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "finish_reason",
    "ttft_ms",
    "duration_ms",
    "prefill_worker",
    "decode_worker",
    "num_attempts",
    "num_left_out",
)
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # id of the call that a task serves
_PLAIN = re.compile(r"[\w.:/#+-]+", re.ASCII)


class JsonFormatter(logging.Formatter):
    """One JSON object a record, in ASCII."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": f"{_time(record)}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE_CHARS],
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_EXCEPTION_CHARS:]
        return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    """`time level process logger: message field=value`; the lines of an exception follow behind a bar."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("pdserve.")
        fields = "".join(f" {name}={_value(value)}" for name, value in _fields(record).items())
        text = printable(record.getMessage()[:MAX_MESSAGE_CHARS])
        lines = [f"{_time(record)} {record.levelname.lower()} {self._process} {name}: {text}{fields}"]
        if record.exc_info:
            story = self.formatException(record.exc_info)[-MAX_EXCEPTION_CHARS:]
            lines += [f"    | {printable(line)}" for line in story.splitlines()]
        return "\n".join(lines)


def printable(text: str) -> str:
    """The text with all invisible or misleading characters escaped: line ends, control and formatting
    characters."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure(settings: LogSettings, process: str) -> None:
    """Configures all of this process's logging: ours from `settings.level` on, others' from warnings on."""
    handler = _handler(settings)
    handler.setFormatter(JsonFormatter(process) if settings.format == "json" else ConsoleFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("pdserve").setLevel(settings.level.upper())
    limit_third_party_lines()


@contextmanager
def configured(settings: LogSettings, process: str) -> Iterator[None]:
    """`configure`, for the time of the block."""
    root, ours = logging.getLogger(), logging.getLogger("pdserve")
    before, levels = root.handlers[:], (root.level, ours.level)
    configure(settings, process)
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def are_json() -> bool:
    """Whether this process logs, and as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _handler(settings: LogSettings) -> logging.Handler:
    if settings.relay is not None:
        try:
            return RelayHandler(settings.relay)
        except OSError:  # another host
            pass
    return logging.StreamHandler(sys.stderr)


def _time(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    values = record.__dict__
    fields = {name: values[name] for name in FIELDS if name in values}
    return (
        fields
        if "request_id" in fields or not (request_id := REQUEST_ID.get())
        else {"request_id": request_id, **fields}
    )


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
