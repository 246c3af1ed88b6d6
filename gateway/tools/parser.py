"""Parses tool calls incrementally from the text of one choice. Pure: text in pieces, events out.

It relies on the grammar: whatever looks like a call is one, in exactly this form. A step costs as much as the
piece that it reads, as only undecided text is kept: the beginning of a marker, or of a call up to its
arguments.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

from .formats import ToolFormat

_OPENING = re.compile(r'[\s\[]*\{"name": "([^"]*)", "(?:arguments|parameters)": ')
_STRUCTURE = re.compile(r'["{}\[\]]')  # outside JSON strings
_STRING = re.compile(r'["\\]')  # inside
LINE_END = "\n"  # Hermes' templates put it before a call: it is not part of the text


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the assistant's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call, from here to its CallEnds; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the arguments of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The arguments of call `index` are complete."""

    index: int


ToolEvent = Text | CallBegins | Arguments | CallEnds


class _State(enum.Enum):
    BEGINNING = enum.auto()  # of an answer that is a call or a text as a whole
    TEXT = enum.auto()
    OPENING = enum.auto()  # after a marker, up to the arguments
    ARGUMENTS = enum.auto()
    BETWEEN = enum.auto()  # after arguments


class ToolParser:
    """Parses one choice."""

    def __init__(self, form: ToolFormat, call_id: Callable[[int], str]) -> None:
        """`call_id` returns the id of the call with an index."""
        self._form = form
        self._call_id = call_id
        self._state = _State.TEXT if form.marker else _State.BEGINNING
        self._rest = ""  # not decided yet
        self._depth = 0  # in the JSON of the arguments
        self._in_string = False
        self._after_backslash = False
        self._num_calls = 0  # complete ones

    @property
    def has_called(self) -> bool:
        """Whether the text so far ends with calls, all of them complete."""
        return self._state is _State.BETWEEN

    def push(self, text: str) -> list[ToolEvent]:
        """Returns the events that are now certain."""
        events: list[ToolEvent] = []
        self._rest += text
        while self._rest and self._step(events):
            pass
        return events

    def flush(self) -> list[ToolEvent]:
        """Returns the remaining events at the end. A call that has not reached its arguments is dropped."""
        rest, self._rest = self._rest, ""
        return [Text(rest)] if rest and self._state is _State.TEXT else []

    def _step(self, events: list[ToolEvent]) -> bool:
        """Reads some of the rest; returns whether more of it may have become readable."""
        match self._state:
            case _State.BEGINNING:
                self._state = _State.OPENING if self._rest[0] == "{" else _State.TEXT
                return True
            case _State.TEXT:
                return self._read_text(events)
            case _State.OPENING:
                return self._read_opening(events)
            case _State.ARGUMENTS:
                return self._read_arguments(events)
            case _State.BETWEEN:
                return self._read_between()

    def _read_text(self, events: list[ToolEvent]) -> bool:
        marker = self._form.marker
        text, found, rest = self._rest.partition(marker) if marker else (self._rest, "", "")
        if found:
            self._state = _State.OPENING
            text = text.removesuffix(LINE_END) if self._form is ToolFormat.HERMES else text
        else:
            certain = len(text) - self._num_held(text)
            text, rest = text[:certain], text[certain:]
        self._rest = rest
        if text:
            events.append(Text(text))
        return bool(found)

    def _num_held(self, text: str) -> int:
        """Returns how many of the last characters may belong to a marker."""
        marker = self._form.marker
        length = next(
            (n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0
        )
        if self._form is ToolFormat.HERMES and text.endswith(LINE_END, 0, len(text) - length):
            length += len(LINE_END)
        return length

    def _read_opening(self, events: list[ToolEvent]) -> bool:
        match = _OPENING.match(self._rest)
        if match is None:
            return False
        self._rest = self._rest[match.end() :]
        self._state = _State.ARGUMENTS
        events.append(CallBegins(self._num_calls, self._call_id(self._num_calls), match[1]))
        return True

    def _read_arguments(self, events: list[ToolEvent]) -> bool:
        end = self._end_of_json(self._rest)
        text, self._rest = self._rest[:end], "" if end is None else self._rest[end:]
        events.append(Arguments(self._num_calls, text))
        if end is None:
            return False
        events.append(CallEnds(self._num_calls))
        self._num_calls += 1
        self._state = _State.BETWEEN
        return True

    def _end_of_json(self, text: str) -> int | None:
        """Returns where the arguments that continue in `text` end; None if not there."""
        at = int(self._after_backslash)
        self._after_backslash = False
        while (match := (_STRING if self._in_string else _STRUCTURE).search(text, at)) is not None:
            at = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif match[0] == "\\":
                at += 1
                self._after_backslash = at > len(text)
            else:
                self._depth += 1 if match[0] in "{[" else -1
                if not self._depth:
                    return at
        return None

    def _read_between(self) -> bool:
        """Looks for another call."""
        beginning = self._form.marker if self._form is ToolFormat.HERMES else "{"
        at = self._rest.find(beginning)
        if at < 0:
            self._rest = self._rest[max(0, len(self._rest) - len(beginning) + 1) :]
            return False
        self._rest = self._rest[at:].removeprefix(self._form.marker)
        self._state = _State.OPENING
        return True
