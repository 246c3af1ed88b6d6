"""What one rendering has used up: time, and the bytes of all that it has put together.

Bytes are never given back, so whatever a template keeps is less than the bound. Containers are weighed when
they are made: a list of a list twice, and so on, is short to write and endless to walk through, and
comparing, printing and sorting walk."""

import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

MAX_CHARS = 16 << 20  # of one text; as many bytes as a message has by default
MAX_BYTES = 256 << 20  # of all texts and containers that a rendering makes
MAX_LEVELS = 100
NODE_BYTES = 64  # of a value by itself, and of its place in a container
ESCAPED = (12, 6)  # characters that one can become in JSON or in a repr: of any text, of ASCII

_CONTAINERS = (list, tuple, dict, ItemsView, KeysView, ValuesView)


class TemplateBound(Exception):
    """A template does more than it may."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Of a value with all levels of it unfolded: no text of it has more bytes, no walk through it more than
    bytes / NODE_BYTES steps."""

    num_bytes: int
    num_levels: int = 0


@dataclass(slots=True)
class Account:
    """Of one rendering."""

    give_up_s: float
    max_bytes: int = MAX_BYTES
    num_bytes: int = 0
    _weights: dict[int, tuple[object, Weight]] = field(default_factory=dict)  # by id; it holds what it names

    def tick(self) -> None:
        """Raises TemplateBound when the time is over."""
        if time.monotonic() > self.give_up_s:
            raise TemplateBound("a conversation that the chat template renders in time")

    def charge(self, num_bytes: int) -> None:
        """Before so much is made, or done at a comparable cost. Raises TemplateBound."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise TemplateBound(f"at most {self.max_bytes} bytes of texts and lists from the chat template")
        self.tick()

    def charge_text(self, num_chars: int, *sources: str) -> None:
        """Before a text of so many characters is made of `sources`. Raises TemplateBound."""
        check_chars(num_chars)
        self.charge(num_chars * (1 if all(map(str.isascii, sources)) else 4))

    def built(self, value: Any, weight: Weight | None = None) -> Any:
        """The same container, charged and weighed; give its weight where it can be told without a walk."""
        self.charge(NODE_BYTES * (4 + len(value)))
        self._remember(value, weight or self._unfolded(value, 0))
        return value

    def weight(self, value: object, level: int = 0) -> Weight:
        """Raises TemplateBound when the value cannot be handled."""
        if isinstance(value, str):
            return Weight(NODE_BYTES + len(value) * ESCAPED[value.isascii()])
        if isinstance(value, _CONTAINERS):
            known = self._weights.get(id(value))
            return known[1] if known is not None else self._remember(value, self._unfolded(value, level))
        return Weight(4 * NODE_BYTES + (value.bit_length() if isinstance(value, int) else 0))

    def text(self, value: object) -> str:
        """As `str`."""
        if isinstance(value, str):
            return value
        self.charge(self.weight(value).num_bytes)
        return str(value)

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same, looking at the clock."""
        for value in values:
            self.tick()
            yield value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """As `list`."""
        items = []
        for value in values:
            self.charge(NODE_BYTES)
            items.append(value)
        self.built(items)
        return items

    def _remember(self, value: object, weight: Weight) -> Weight:
        if weight.num_bytes > MAX_BYTES or weight.num_levels > MAX_LEVELS:
            raise TemplateBound(
                f"lists of at most {MAX_BYTES} bytes and {MAX_LEVELS} levels in the chat template"
            )
        self._weights[id(value)] = value, weight
        return weight

    def _unfolded(self, value: Any, level: int) -> Weight:
        num_bytes, num_levels = NODE_BYTES, 0
        if level > MAX_LEVELS:
            raise TemplateBound(f"lists of at most {MAX_LEVELS} levels in the chat template")
        for part in _parts(value):
            self.tick()
            weight = self.weight(part, level + 1)
            num_bytes += weight.num_bytes + NODE_BYTES
            num_levels = max(num_levels, weight.num_levels)
        return Weight(num_bytes, num_levels + 1)


def _parts(value: Any) -> Iterator[object]:
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from pair
    else:
        yield from value


def check_chars(num_chars: int) -> None:
    """Raises TemplateBound."""
    if num_chars > MAX_CHARS:
        raise TemplateBound(f"at most {MAX_CHARS} characters from the chat template")


_current: ContextVar[Account] = ContextVar("account")


def account() -> Account:
    """Of the rendering that is going on in this thread."""
    return _current.get()


def open_account(timeout_s: float, max_bytes: int = MAX_BYTES) -> None:
    """A rendering begins."""
    _current.set(Account(time.monotonic() + timeout_s, max_bytes))
