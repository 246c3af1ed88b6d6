"""The methods of texts and containers that templates may call. Others are refused, as their cost is
unknown."""

from collections.abc import Callable, Iterable
from functools import partial
from string import Formatter
from typing import Any

from .account import ESCAPED, NODE_BYTES, TemplateBound, Weight, account

MAX_CASED = 3  # characters that one can become in another case
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

Method = Callable[..., Any]  # of the object, then of the arguments


def _plain(name: str) -> Method:
    """Returns a method that takes at most linear time in the text or the container, and creates nothing."""

    def method(value: Any, *arguments: Any) -> Any:
        account().tick()
        return getattr(value, name)(*arguments)

    return method


def _cased(name: str) -> Method:
    def method(text: str) -> Any:
        account().charge_text(MAX_CASED * len(text), text)
        return getattr(text, name)()

    return method


def stripped(text: str, chars: str | None = None, how: Callable[..., str] = str.strip) -> str:
    """Looks up each character of the text among `chars`."""
    account().charge_text(len(text), text)
    account().charge(len(text) * len(chars or "") // 16)
    return how(text, chars)


def _without(name: str) -> Method:
    def method(text: str, affix: str) -> Any:
        account().charge_text(len(text), text)
        return getattr(text, name)(affix)

    return method


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    num_places = text.count(old)
    if count >= 0:
        num_places = min(num_places, count)
    account().charge_text(len(text) + num_places * max(0, len(new) - len(old)), text, new)
    return text.replace(old, new, count)


def joined(separator: str, values: Iterable[str]) -> str:
    texts = account().listed(values)
    num_chars = sum(len(text) for text in texts if isinstance(text, str))
    account().charge_text(num_chars + len(separator) * max(0, len(texts) - 1), separator, *texts)
    return separator.join(texts)


def _padded(name: str) -> Method:
    def method(text: str, width: int, *fill: str) -> Any:
        account().charge_text(max(len(text), width), text, *fill)
        return getattr(text, name)(width, *fill)

    return method


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> Any:
    num_parts = text.count(sep) + 1 if sep else len(text) // 2 + 1
    return _parted(text, num_parts, maxsplit, lambda: text.split(sep, maxsplit))


def _rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> Any:
    _charge_backwards(text, sep or "")
    num_parts = text.count(sep) + 1 if sep else len(text) // 2 + 1
    return _parted(text, num_parts, maxsplit, lambda: text.rsplit(sep, maxsplit))


def _splitlines(text: str, keepends: bool = False) -> Any:
    return _parted(text, sum(map(text.count, _LINE_ENDS)) + 1, -1, lambda: text.splitlines(keepends))


def _partition(text: str, sep: str) -> Any:
    return _parted(text, 3, -1, lambda: text.partition(sep))


def _rpartition(text: str, sep: str) -> Any:
    _charge_backwards(text, sep)
    return _parted(text, 3, -1, lambda: text.rpartition(sep))


def _backwards(name: str) -> Method:
    def method(text: str, wanted: str, *between: int) -> Any:
        _charge_backwards(text, wanted)
        return getattr(text, name)(wanted, *between)

    return method


def _charge_backwards(text: str, wanted: str) -> None:
    """A search from the end takes at worst the product of both lengths, unlike one from the start."""
    account().charge(len(text) * (1 + len(wanted) // 4))


def _parted(text: str, num_parts: int, max_splits: int, part: Callable[[], Any]) -> Any:
    if max_splits >= 0:
        num_parts = min(num_parts, max_splits + 1)
    account().charge(NODE_BYTES * num_parts)
    account().charge_text(len(text), text)
    weight = 2 * NODE_BYTES * num_parts + len(text) * ESCAPED[text.isascii()]
    return account().built(part(), Weight(NODE_BYTES + weight, 1))


def formatted(text: str, *arguments: Any, **named: Any) -> str:
    """Like str.format, for fields without a format spec and without attributes."""
    parts, following = [], 0
    for literal, name, form, conversion in Formatter().parse(text):
        parts.append(literal)
        if name is None:
            continue
        if form or conversion or not (name == "" or name.isalnum() or name.isidentifier()):
            raise TemplateBound("str.format with plain fields in the chat template")
        if name == "":
            name, following = str(following), following + 1
        parts.append(account().text(arguments[int(name)] if name.isdecimal() else named[name]))
    return joined("", parts)


_TESTS = (
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
)
_PLAIN: dict[type, tuple[str, ...]] = {
    str: ("count", "endswith", "find", "index", "startswith", *_TESTS),
    list: ("count", "index"),
    tuple: ("count", "index"),
    dict: ("get", "items", "keys", "values"),
}
METHODS: dict[tuple[type, str], Method] = {
    **{(kind, name): _plain(name) for kind, names in _PLAIN.items() for name in names},
    **{
        (str, name): _cased(name)
        for name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper")
    },
    **{(str, name): _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{(str, name): _without(name) for name in ("removeprefix", "removesuffix")},
    **{(str, name): _backwards(name) for name in ("rfind", "rindex")},
    **{(str, how.__name__): partial(stripped, how=how) for how in (str.strip, str.lstrip, str.rstrip)},
    (str, "format"): formatted,
    (str, "join"): joined,
    (str, "partition"): _partition,
    (str, "replace"): replaced,
    (str, "rpartition"): _rpartition,
    (str, "rsplit"): _rsplit,
    (str, "split"): _split,
    (str, "splitlines"): _splitlines,
}
