"""The filters of templates: jinja2's where they create nothing large, and replacements that charge first.

jinja2's other filters exist by name, and are refused when reached: a model none of whose chats need one can
be served."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Undefined
from jinja2.environment import Environment
from jinja2.filters import FILTERS as JINJA, do_dictsort, do_indent, do_title, make_attrgetter
from jinja2.runtime import Context
from jinja2.utils import pass_context, pass_environment

from .account import NODE_BYTES, TemplateBound, account
from .methods import METHODS, joined, replaced, stripped

Filter = Callable[..., Any]
MAX_INDENT = 16
MAX_DIGITS = 100
MAX_NUMBER_CHARS = 2000  # of a number in a printf, with its width

_CONVERSION = re.compile(r"%(?:\(\w+\))?[-#0 +]*\d{0,2}(?:\.\d{0,2})?[hlL]?[a-zA-Z%]")


def printf(text: str, values: Any) -> str:
    """Like the % of a text: widths have at most two digits."""
    num_values = len(_CONVERSION.findall(text))
    if "%" in _CONVERSION.sub("", text):
        raise TemplateBound("conversions with widths below 100 in the chat template")
    account().charge(len(text) + num_values * (MAX_NUMBER_CHARS + account().weight(values).num_bytes))
    return str(text % values)


def slice_of(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """value[start:stop:step]"""
    which = slice(start, stop, step)
    if isinstance(value, str):
        account().charge_text(len(value), value)
    elif isinstance(value, list | tuple):
        return account().built(value[which], account().weight(value))
    return value[which]


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Like the filter of transformers."""
    weight, width = account().weight(value), 0
    if indent is not None:
        width = len(indent) if isinstance(indent, str) else int(indent)
    if width > MAX_INDENT or (separators is not None and max(map(len, separators)) > MAX_INDENT):
        raise TemplateBound(f"JSON indented by at most {MAX_INDENT} in the chat template")
    account().charge(
        weight.num_bytes + weight.num_bytes // NODE_BYTES * (MAX_INDENT + width * weight.num_levels)
    )
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)  # in C, unlike the other
    return "".join(account().each(encoder.iterencode(value)))


def _text_filter(method: str) -> Filter:
    def filter_(value: Any) -> Any:
        return METHODS[str, method](account().text(value))

    return filter_


def _trim(value: Any, chars: str | None = None) -> str:
    return stripped(account().text(value), chars)


def _title(value: Any) -> str:
    text = account().text(value)
    account().charge(4 * NODE_BYTES * len(text))  # a part and its two halves per letter, at worst
    return do_title(text)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return replaced(
        account().text(value), account().text(old), account().text(new), -1 if count is None else count
    )


def _escape(value: Any) -> str:
    text = account().text(value)
    for char, entity in (("&", "&amp;"), (">", "&gt;"), ("<", "&lt;"), ("'", "&#39;"), ('"', "&#34;")):
        text = replaced(text, char, entity)
    return text


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = account().text(value)
    num_lines = len(METHODS[str, "splitlines"](text)) + 2
    num_more = len(width) if isinstance(width, str) else width
    account().charge_text(len(text) + num_lines * (1 + num_more), text, str(width))
    return do_indent(text, width, first, blank)


def _format(value: Any, *arguments: Any, **named: Any) -> str:
    return printf(account().text(value), named or arguments)


@pass_environment
def _join(
    environment: Environment, values: Iterable[Any], d: Any = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return joined(account().text(d), map(account().text, values))


def _list(values: Iterable[Any]) -> list[Any]:
    return account().listed(values)


def _reverse(values: Any) -> Any:
    return slice_of(values, None, None, -1) if isinstance(values, str) else account().listed(values)[::-1]


@pass_environment
def _sum(
    environment: Environment, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    total = start
    for value in account().each(values):
        if not isinstance(value, int | float) or not isinstance(total, int | float):
            raise TemplateBound("sums of numbers in the chat template")
        total += value
    return total


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > MAX_DIGITS:
        raise TemplateBound(f"at most {MAX_DIGITS} digits in the chat template")
    return JINJA["round"](value, precision, method)


@pass_environment
def _sort(environment: Environment, values: Iterable[Any], *arguments: Any, **named: Any) -> list[Any]:
    items = account().listed(values)
    _charge_sorting(items)
    return list(JINJA["sort"](environment, items, *arguments, **named))


def _dictsort(value: Mapping[Any, Any], *arguments: Any, **named: Any) -> Any:
    _charge_sorting(value)
    return account().built(do_dictsort(value, *arguments, **named))


def _charge_sorting(values: Any) -> None:
    """Each comparison may traverse its operands."""
    num_rounds = len(values).bit_length()
    account().charge(len(values) * NODE_BYTES + account().weight(values).num_bytes * num_rounds // 8)


def _over_each(name: str) -> Filter:
    """Returns jinja2's filter, which takes values one by one, with a check of the clock for each."""
    original = JINJA[name]

    @pass_context
    def filter_(context: Context, values: Iterable[Any], *arguments: Any, **named: Any) -> Any:
        first = context.environment if name in ("max", "min", "unique") else context
        source = values if isinstance(values, Undefined) or not values else account().each(values)
        return original(first, source, *arguments, **named)

    return filter_


def _refused(name: str) -> Filter:
    def filter_(*_: Any, **__: Any) -> Any:
        raise TemplateBound(f"no filter {name!r} in the chat template")

    return filter_


_HARMLESS = ("abs", "count", "d", "default", "first", "float", "int", "items", "last", "length")
FILTERS: dict[str, Filter] = {
    **{name: _refused(name) for name in JINJA},
    **{name: JINJA[name] for name in _HARMLESS},
    **{name: _text_filter(name) for name in ("capitalize", "lower", "upper")},
    **{
        name: _over_each(name)
        for name in ("map", "max", "min", "reject", "rejectattr", "select", "selectattr", "unique")
    },
    "dictsort": _dictsort,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda value: account().text(
        value
    ),  # nothing is escaped unless requested, so nothing needs a mark
    "sort": _sort,
    "string": lambda value: account().text(value),
    "sum": _sum,
    "title": _title,
    "tojson": tojson,
    "trim": _trim,
}
