"""YAML as plain values, with the line on which each key stands."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from .errors import ConfigError

KeyPath = tuple[str, ...]
MAX_DEPTH = 16
MAX_VALUES = 10_000  # aliases can make a small file describe a huge tree


@dataclass(frozen=True)
class Document:
    """A parsed file: its plain values and where they stood."""

    filename: str
    values: Any
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """The line of the key at `path`, or of the nearest key around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse_yaml(text: str, filename: str) -> Document:
    """Raises ConfigError where `text` is not one YAML document without duplicate keys."""
    try:
        _check_size(text)
        loaded = YAML(typ="rt", pure=True).load(io.StringIO(text))
        walk = _Walk()
        return Document(filename, walk.plain(loaded, ()), walk.lines)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{filename}:{line}: not valid YAML: {error.reason}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{filename}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except (_TooLarge, RecursionError):
        raise ConfigError(
            f"{filename}:1: more than {MAX_DEPTH} levels or {MAX_VALUES} values, expected a configuration"
        ) from None
    except Exception as error:  # ruamel raises all kinds for odd input, such as a mapping as a key
        raise ConfigError(f"{filename}:1: not valid YAML: {' '.join(str(error).split())}") from None


class _TooLarge(Exception):
    """The document is deeper or larger than a configuration can be."""


def _check_size(text: str) -> None:
    """Raises _TooLarge by the parser's events: thousands of levels take seconds to compose."""
    depth = num_values = 0
    for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
        match event:
            case CollectionStartEvent():
                depth += 1
            case CollectionEndEvent():
                depth -= 1
            case ScalarEvent() | AliasEvent():
                num_values += 1
        if depth > MAX_DEPTH or num_values > 2 * MAX_VALUES:  # keys are scalars, too
            raise _TooLarge


class _Walk:
    """Turns ruamel's containers into dicts and lists and notes the line of every key."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._num_values = 0

    def plain(self, value: object, path: KeyPath) -> Any:
        self._num_values += 1
        if len(path) > MAX_DEPTH or self._num_values > MAX_VALUES:
            raise _TooLarge
        if isinstance(value, CommentedMap):
            return {str(key): self._entry(value, key, (*path, str(key)), value.lc.data) for key in value}
        if isinstance(value, CommentedSeq):
            return [self.plain(item, (*path, str(index))) for index, item in enumerate(value)]
        if isinstance(value, ScalarBoolean):
            return bool(value)
        for kind in (str, int, float):
            if isinstance(value, kind) and not isinstance(value, bool):
                return kind(value)
        return value

    def _entry(
        self, holder: CommentedMap, key: object, path: KeyPath, positions: Mapping[object, Any] | None
    ) -> Any:
        if positions is not None and key in positions:  # keys merged from an anchor have none
            self.lines[path] = positions[key][0] + 1
        return self.plain(holder[key], path)
