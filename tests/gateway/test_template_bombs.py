"""No chat template uses much time or memory: it fails with an error first."""

import contextlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest
from jinja2.filters import FILTERS

from pdserve.core.errors import InvalidRequest
from pdserve.gateway.text.chat_template import ChatTemplate
from pdserve.gateway.text.template.account import MAX_BYTES

CHAT = [{"role": "user", "content": "hi"}]
GROW = "{% set ns = namespace(t='x', l=['x']) %}{% for i in range(90) %}"

LONG = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested conditions": "{% for a in range(99999) if (range(99999) | list | sum) < 0 %}{% endfor %}",
    "recursive macros": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "filters that hand on": (
        "{% for i in range(99999) | map('string') %}{{ range(99999) | map('int') | max }}{% endfor %}"
    ),
    "unpacked arguments": (
        "{% macro m() %}{% endmacro %}{% for i in range(9999) %}{{ m(*range(99999)) }}{% endfor %}"
    ),
    "much output": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "searches from the end": "{{ ('a' * 9999999).rfind('b' + 'a' * 4999999) }}",
    "splits from the end": "{{ ('a' * 9999999).rsplit('b' + 'a' * 4999999) }}",
    "stripping of many": "{% for i in range(99) %}{{ ('é' * 999999).strip('x' * 999999 + 'é') }}{% endfor %}",
    "sorting": "{{ (range(99999) | list * 40) | sort }}",
    "sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "colliding keys": "{{ dict(range(99999) | map('string') | list) }}",
}
HUGE = {
    "product of a text": "{{ 'x' * 10000000000 }}",
    "product of a list": "{{ ([1] * 10000000000) | length }}",
    "product from the left": "{{ 10000000000 * 'x' }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": GROW + "{% set ns.t = (ns.t | length + 2) if i == 0 else ns.t * ns.t %}{% endfor %}",
    "rounding": "{{ 1.5 | round(10 ** 10, 'floor') }}",
    "rounding of a whole number": "{{ 5 | round(-10 ** 10) }}",
    "doubling": GROW + "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubling by ~": GROW + "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "doubling of a list": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "doubling by formats": GROW + "{% set ns.t = '{0}{0}'.format(ns.t) %}{% endfor %}",
    "doubling by %s": GROW + "{% set ns.t = '%s%s' | format(ns.t, ns.t) %}{% endfor %}",
    "doubling by a block": GROW + "{% set t %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = t %}{% endfor %}",
    "doubling by a macro": (
        "{% macro m(t) %}{{ t }}{{ t }}{% endmacro %}" + GROW + "{% set ns.t = m(ns.t) %}{% endfor %}"
    ),
    "a list of a list": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "comparing": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == [ns.l[0], ns.l[1]] }}",
    "hashing": GROW + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ {ns.l: 1} }}",
    "a mapping of a mapping": GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | tojson }}",
    "a dict of a dict": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "views": (
        "{% set ns = namespace(l={}) %}{% for i in range(90) %}{% set ns.l = {1: ns.l.items(), 2: ns.l} %}{%"
        " endfor %}"
    ),
    "arguments of arguments": (
        "{% macro m(n) %}{{ m(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ m(90, 1) }}"
    ),
    "named arguments": (
        "{% macro m(n) %}{{ m(n - 1, a=kwargs, b=kwargs) if n else kwargs }}{% endmacro %}{{ m(90, c=1) }}"
    ),
    "levels": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}",
    "join": "{{ range(99999) | join('x' * 9999) }}",
    "join of a text": "{{ ('x' * 9999).join('y' * 99999) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "padding": "{{ 'x'.center(10 ** 10) }}",
    "zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "indented lines": "{{ ('\n' * 99999) | indent(99999, blank=true) }}",
    "indented by a text": "{{ '\n' | indent('y' * 9999999, first=true) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "replaced nothing": "{{ 'x' * 99999 }}{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "width in a %": "{{ '%10000000000d' % 1 }}",
    "width in a format filter": "{{ '%99999999999d' | format(1) }}",
    "width as an argument": "{{ '%*d' | format(9999999999, 1) }}",
    "width in str.format": "{{ '{:>9999999999}'.format(1) }}",
    "nested width": "{{ '{:{}}'.format(1, 9999999999) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "wordwrap": "{{ ('x' * 9999) | wordwrap(1, wrapstring='y' * 9999999) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "separators of JSON": "{{ ([1] * 99999) | tojson(separators=['x' * 99999, 'y']) }}",
    "kept texts": (
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 9999999] %}{%"
        " endfor %}"
    ),
    "repeated text of the template": (
        "{% set t %}{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endset %}"
    ),
    "words": "{{ ('x ' * 7999999).split() | length }}",
    "parts": "{{ ('x' * 9999999).split('x') | length }}",
    "lines": "{{ ('\n' * 9999999).splitlines() | length }}",
    "characters": "{{ ('x' * 9999999) | list | length }}",
    "upper case": "{% for i in range(999) %}{{ ('ŉ' * 4999999) | upper | length }}{% endfor %}",
    "escapes": "{{ ('<' * 9999999) | e | length }}",
    "dates": "{{ strftime_now('%9999999999Y') }}",
    "paragraphs": "{{ lipsum(n=10 ** 9) }}",
}


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", LONG.values(), ids=LONG)
def test_an_endless_template_is_ended(source: str) -> None:
    template = ChatTemplate(source, {})
    with _little_memory(), pytest.raises(InvalidRequest):
        template.render(CHAT, timeout_s=0.05)


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_builds_a_huge_value_is_ended_first(source: str) -> None:
    template = ChatTemplate(source, {})
    with _little_memory(), pytest.raises(InvalidRequest):
        template.render(CHAT, timeout_s=1.0)


def test_a_loop_is_ended_at_its_time_limit() -> None:
    with pytest.raises(InvalidRequest, match="in time"):
        ChatTemplate(LONG["nested loops"], {}).render(CHAT, timeout_s=0.05)


@pytest.mark.parametrize(
    "call",
    [
        "'x'.encode()",
        "'x'.translate({})",
        "(1).to_bytes(10 ** 10)",
        "messages.copy()",
        "messages[0].fromkeys([1])",
        "[1].sort()",
    ],
)
def test_a_method_without_a_known_bound_is_not_called(call: str) -> None:
    with pytest.raises(InvalidRequest, match=r"may not call|not safely callable|is unsafe"):
        ChatTemplate("{{ " + call + " }}", {}).render(CHAT)


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_no_filter_makes_more_than_the_bound_of_a_large_text(name: str) -> None:
    source = (
        "{% set t = 'x<' * 2000000 %}{% for i in range(99) %}{{ t | "
        + name
        + " | string | length }}{% endfor %}"
    )
    template = ChatTemplate(source, {})
    with _little_memory(), contextlib.suppress(InvalidRequest):  # some produce little from it
        template.render(CHAT, timeout_s=0.3)


COMPILED = {
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "sum": "{{ " + "1+" * 20000 + "1 }}",
    "statements": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "long": "x" * 999999,
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "filters": "{{ a" + "|trim" * 50_000 + " }}",
    "outputs": "{{a}}" * 52_000,
    "comparisons": "{{ a" + "<a" * 100_000 + " }}",
    "list": "{{ [" + "1," * 120_000 + "] }}",
    "digits": "{{ " + "9" * 5000 + " }}",
    "hexadecimal digits": "{{ 0x" + "f" * 200_000 + " }}",
    "choices": "{% if a %}" + "{% elif a %}" * 18_000 + "{% endif %}",
    "brackets": "{{ " + "[" * 100_000,
}
FOLDED = (
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
)
BOUNDED = """
import json, resource, sys
from pdserve.core.errors import CheckpointError
from pdserve.gateway.text.chat_template import ChatTemplate
resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
for name, source in json.load(sys.stdin).items():
    try:
        ChatTemplate(source, {})
        print(name, "compiled")
    except CheckpointError as error:
        print(name, "refused" if len(str(error)) < 300 and str(error).isprintable() else error)
"""


def test_a_template_too_large_to_compile_is_refused_within_bounds() -> None:
    command = [sys.executable, "-c", BOUNDED]
    ended = subprocess.run(command, input=json.dumps(COMPILED), capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"{name} refused" for name in COMPILED]


def test_compiling_a_template_computes_nothing() -> None:
    templates = {f"template{index}": source for index, source in enumerate(FOLDED)}
    command = [sys.executable, "-c", BOUNDED]
    ended = subprocess.run(command, input=json.dumps(templates), capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"{name} compiled" for name in templates]
