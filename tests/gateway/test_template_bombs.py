"""No chat template uses much time or memory: it is refused first, or ends the process that renders it."""

import json
import subprocess
import sys
from functools import cache

import pytest
from jinja2.filters import FILTERS

from pdserve.core.limited_child import Death
from pdserve.gateway.text.encoding import RENDER_BYTES

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
    "hashing": GROW + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ {ns.l: 1} }}",
    "a mapping of a mapping": GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | tojson }}",
    "a dict of a dict": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "arguments of arguments": (
        "{% macro m(n) %}{{ m(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ m(90, 1) }}"
    ),
    "named arguments": (
        "{% macro m(n) %}{{ m(n - 1, a=kwargs, b=kwargs) if n else kwargs }}{% endmacro %}{{ m(90, c=1) }}"
    ),
    "join": "{{ range(99999) | join('x' * 9999) }}",
    "join of a text": "{{ ('x' * 9999).join('y' * 99999) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "padding": "{{ 'x'.center(10 ** 10) }}",
    "zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "indented lines": "{{ ('\n' * 99999) | indent(99999, blank=true) }}",
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
    "upper case": "{% for i in range(999) %}{{ ('ŉ' * 4999999) | upper | length }}{% endfor %}",
    "paragraphs": "{{ lipsum(n=10 ** 9) }}",
}


# these may be rendered, if their time and memory suffice
MODEST = {
    "searches from the end": "{{ ('a' * 9999999).rfind('b' + 'a' * 4999999) }}",
    "splits from the end": "{{ ('a' * 9999999).rsplit('b' + 'a' * 4999999) }}",
    "rounding of a whole number": "{{ 5 | round(-10 ** 10) }}",
    "comparing": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == [ns.l[0], ns.l[1]] }}",
    "views": (
        "{% set ns = namespace(l={}) %}{% for i in range(90) %}{% set ns.l = {1: ns.l.items(), 2: ns.l} %}{%"
        " endfor %}"
    ),
    "levels": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}",
    "indented by a text": "{{ '\n' | indent('y' * 9999999, first=true) }}",
    "words": "{{ ('x ' * 7999999).split() | length }}",
    "parts": "{{ ('x' * 9999999).split('x') | length }}",
    "lines": "{{ ('\n' * 9999999).splitlines() | length }}",
    "characters": "{{ ('x' * 9999999) | list | length }}",
    "escapes": "{{ ('<' * 9999999) | e | length }}",
    "dates": "{{ strftime_now('%9999999999Y') }}",
}
# renders each template, as the process for short conversations does, until one kills it
RENDERER = """
import gc, json, resource, sys
import msgspec
from pdserve.core import limited_process
from pdserve.core.config import LimitsSection
from pdserve.gateway.offload import main
from pdserve.gateway.offload.messages import Done, IntakeJob, RenderChat
from pdserve.gateway.text.tokenizer_loading.messages import TemplateData
from pdserve.proto import pdserve_pb2 as pb

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]).SerializeToString()
job = IntakeJob(RenderChat(), LimitsSection().model_dump_json().encode(), len(chat))
limited_process.set_up()
limited_process.limit_memory(main.MEMORY_BYTES)
before = used()
for name, source in json.load(sys.stdin).items():
    worker = main.TemplateWorker(msgspec.msgpack.encode(TemplateData({"default": source}, {})))
    gc.collect()  # as after a refusal
    print(json.dumps(name), end=" ", flush=True)
    with limited_process.cpu_limit(main.RENDER_JOB_S):
        answer, _ = main._answer(worker, job, chat)
    outcome = "rendered" if isinstance(answer, Done) else "costly" if answer.is_too_costly else "refused"
    print(json.dumps([outcome, used() - before]), flush=True)
"""


@cache
def outcomes() -> dict[str, tuple[str, int]]:
    """Returns what became of each template, and the most memory that its process has taken until then."""
    waiting, found = ALL, dict[str, tuple[str, int]]()
    while waiting:
        command = [sys.executable, "-c", RENDERER]
        ended = subprocess.run(command, input=json.dumps(waiting), capture_output=True, text=True)
        for line in ended.stdout.splitlines():
            name, end = json.JSONDecoder().raw_decode(line)
            found[name] = tuple(json.loads(line[end:].strip() or '["killed", 0]'))
        assert ended.returncode == 0 or Death.of(ended.returncode) is not Death.OTHER, ended.stderr[-2000:]
        waiting = {name: source for name, source in waiting.items() if name not in found}
    return found


OF_FILTERS = {
    f"filter {name}": (
        "{% set t = 'x<' * 2000000 %}{% for i in range(99) %}{{ t | "
        + name
        + " | string | length }}{% endfor %}"
    )
    for name in sorted(FILTERS)
}
ALL = LONG | HUGE | MODEST | OF_FILTERS


@pytest.mark.parametrize("name", LONG)
def test_an_endless_template_is_ended(name: str) -> None:
    assert outcomes()[name][0] in ("refused", "costly", "killed")


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_builds_a_huge_value_is_ended_first(name: str) -> None:
    assert outcomes()[name][0] in ("refused", "costly", "killed")


@pytest.mark.parametrize("name", ALL)
def test_no_template_takes_more_memory_than_one_may(name: str) -> None:
    assert outcomes()[name][1] <= RENDER_BYTES


def test_most_templates_are_ended_without_their_process() -> None:
    """So that the conversations of other clients go on at once."""
    assert outcomes()["nested loops"][0] == outcomes()["doubling"][0] == "costly"
    assert sum(outcome == "killed" for outcome, _ in outcomes().values()) < len(ALL) // 4


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
    "{{ 10 ** (10 ** 10) }}",
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
        ChatTemplate(source, {}).compile()
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
