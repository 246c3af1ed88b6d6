"""The resources that one rendering has used: time, and the bytes of everything that it has created.

Bytes are never refunded, so whatever a template keeps is below the bound. Containers are weighed when they
are created: a list that holds a list twice, and so on, is short to write and endless to traverse, and
comparing, printing and sorting traverse."""

import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

MAX_CHARS = 16 << 20  # of one text; as many bytes as a message has by default
MAX_BYTES = 256 << 20  # of all texts and containers that a rendering creates
MAX_LEVELS = 100
NODE_BYTES = 64  # of a value by itself, and of its place in a container
ESCAPED = (12, 6)  # characters that one can become in JSON or in a repr: of any text, of ASCII

_CONTAINERS = (list, tuple, dict, ItemsView, KeysView, ValuesView)


class TemplateBound(Exception):
    """A template exceeds its bounds."""


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a value with all its levels unfolded: no text of it has more bytes, and no traversal more
    than bytes / NODE_BYTES steps."""

    num_bytes: int
    num_levels: int = 0


@dataclass(slots=True)
class Account:
    """The account of one rendering."""

    give_up_s: float
    max_bytes: int = MAX_BYTES
    num_bytes: int = 0
    _weights: dict[int, tuple[object, Weight]] = field(default_factory=dict)  # by id; keeps the object alive

    def tick(self) -> None:
        """Raises TemplateBound if the time is over."""
        if time.monotonic() > self.give_up_s:
            raise TemplateBound("a conversation that the chat template renders in time")

    def charge(self, num_bytes: int) -> None:
        """Charges before this many bytes are created, or work of comparable cost is done. Raises
        TemplateBound."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise TemplateBound(f"at most {self.max_bytes} bytes of texts and lists from the chat template")
        self.tick()

    def charge_text(self, num_chars: int, *sources: str) -> None:
        """Charges before a text of this many characters is made from `sources`. Raises TemplateBound."""
        check_chars(num_chars)
        self.charge(num_chars * (1 if all(map(str.isascii, sources)) else 4))

    def built(self, value: Any, weight: Weight | None = None) -> Any:
        """Returns the same container, charged and weighed; pass its weight if it is known without a
        traversal."""
        self.charge(NODE_BYTES * (4 + len(value)))
        self._remember(value, weight or self._unfolded(value, 0))
        return value

    def weight(self, value: object, level: int = 0) -> Weight:
        """Raises TemplateBound if the value cannot be handled."""
        if isinstance(value, str):
            return Weight(NODE_BYTES + len(value) * ESCAPED[value.isascii()])
        if isinstance(value, _CONTAINERS):
            known = self._weights.get(id(value))
            return known[1] if known is not None else self._remember(value, self._unfolded(value, level))
        return Weight(4 * NODE_BYTES + (value.bit_length() if isinstance(value, int) else 0))

    def text(self, value: object) -> str:
        """Like `str`."""
        if isinstance(value, str):
            return value
        self.charge(self.weight(value).num_bytes)
        return str(value)

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the same items, and checks the clock."""
        for value in values:
            self.tick()
            yield value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """Like `list`."""
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
    """The account of the rendering that this thread is running."""
    return _current.get()


def open_account(timeout_s: float, max_bytes: int = MAX_BYTES) -> None:
    """Starts a rendering."""
    _current.set(Account(time.monotonic() + timeout_s, max_bytes))
