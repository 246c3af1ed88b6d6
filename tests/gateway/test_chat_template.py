"""Checkpoints' templates render as in transformers, in a sandbox."""

from contextlib import suppress
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.gateway.text.chat_template import ChatTemplate, TemplateOptions
from tests.gateway.chat_templates import FAMILIES
from tests.gateway.support import byte_level

CHAT = [{"role": "system", "content": "be  brief"}, {"role": "user", "content": 'say "hé" <b>'}]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": " be brief\n"},
    {"role": "user", "content": "how warm is it in Pôrto?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call-123456789",
                "function": {"name": "warmth", "arguments": {"where": "Pôrto", "deep": [1, {"b": True}]}},
            }
        ],
    },
    {"role": "tool", "content": [{"celsius": 21.5, "text": "21,5"}]},
    {"role": "assistant", "content": "<think>\nso ...\n</think>\n\n21.5 °C"},
    {"role": "user", "content": "<b>thanks</b>"},
]
TEMPLATES = {
    "loop": (
        "{% for m in messages %}\n{{ loop.index }}{{ m['role'] + ':' + m.content | trim }}{{ eos_token }}\n{%"
        " endfor %}"
    ),
    "loop variables": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
    "conditions": "{% for m in messages if m.role != 'system' %}{{ m.content }}{% else %}none{% endfor %}",
    "macro": (
        "{% macro show(m) -%}[{{ m.role }}]{%- endmacro %}{% for m in messages %}{{ show(m) ~ '-' ~ 1 }}{%"
        " endfor %}"
    ),
    "arguments": (
        "{% macro all() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ all(1, 'x', a=[2]) }}{{ dict(messages[0],"
        " b=2) }}"
    ),
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson }}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": (
        "{% if tools %}tools{% elif tools is none %}no tools{% endif %}{% if add_generation_prompt %}go{%"
        " endif %}"
    ),
    "slices": (
        "{{ messages[1:][0].content.split(' ')[-1] }}{{ '-' * 3 }}{{ 2 ** 3 + 7 % 4 }}{{ [1, 2] * 2 + [3] }}"
        "{{ 'abc'[::-1] }}"
    ),
    "recursion": (
        "{% for m in [[1], 2] recursive %}{% if m is iterable %}{{ loop(m) }}{% else %}{{ m }}{% endif %}{%"
        " endfor %}"
    ),
    "call": (
        "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}{{ messages[0].content }}{%"
        " endcall %}"
    ),
    "texts": (
        "{{ 'a-b-a'.replace('a', 'cc', 1) }}{{ ' x '.strip() }}{{ 'xay'.rsplit('a', 1) }}{{"
        " 'a\nb'.splitlines() }}{{ 'xay'.partition('a') }}{{ 'aXa'.rfind('a') }}{{ 'x'.ljust(3) }}{{"
        " '7'.zfill(3) }}{{ ', '.join(['a', 'b']) }}"
    ),
    "formats": (
        "{{ '{}-{b}-{}'.format(1, [2], b='c') }}{{ '%s=%05.2f' | format('x', 1.5) }}{{ '%d%%' % 3 }}"
        "{{ '%(a)s' % {'a': 1} }}"
    ),
    "filters": (
        "{{ 'a b\nc' | title | indent(2, true) }}{{ [3, 1, 2] | sort | reverse | list }}{{ [1, 1.5] | sum"
        " }}{{ 2.5 | round }}{{ 'aab' | list | unique | join('+') }}{{ '<a&b>' | e }}{{ [2, 1] | min }}{{"
        " 'ab' | replace('a', '') }}{{ '7' | int + 1 }}"
    ),
    "generation's variables": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "dictionaries": "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a'], 1) }}{{ {'a': 1} | items | list }}",
    "namespaces": "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns }}",
    "JSON's options": "{{ messages | tojson(ensure_ascii=true, separators=[',', ':'], sort_keys=true) }}",
    "dates": "{{ strftime_now('%Y') }}",
    "documents": "{{ documents is none }}",
    "autoescape": "{% autoescape true %}{{ messages[1].content }}{% endautoescape %}",
    "methods": "{{ 'x'.encode() }}{{ messages.copy() | length }}{{ 'äx'.upper() }}{{ '1\t'.expandtabs(2) }}",
    "blocks": (
        "{% set t %}a{% block b %}<{{ t }}>{% endblock %}{% endset %}{{ t }}{% filter upper %}x{{ 'y' }}{%"
        " endfilter %}{% with a = 1 %}{{ a }}{% endwith %}"
    ),
}


def _rendered_by_transformers(source: str, chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=byte_level()._backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=source,
    )
    return str(
        reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    )


def _continued_by_transformers(source: str, chat: list[dict[str, Any]]) -> str:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=byte_level()._backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=source,
    )
    return str(reference.apply_chat_template(chat, tokenize=False, continue_final_message=True))


def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str, add: bool) -> None:
    assert _template(TEMPLATES[name]).render(CHAT, add) == _rendered_by_transformers(
        TEMPLATES[name], CHAT, add
    )


@pytest.mark.parametrize("chat", [CHAT, WITH_TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_the_well_known_families_render_as_transformers_renders_them(
    name: str, chat: list[dict[str, Any]]
) -> None:
    assert _template(FAMILIES[name]).render(chat) == _rendered_by_transformers(FAMILIES[name], chat, True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_of_megabytes_is_rendered(name: str) -> None:
    chat = [
        *CHAT,
        *({"role": role, "content": "wörd " * 4000} for _ in range(25) for role in ("assistant", "user")),
    ]
    assert len(_template(FAMILIES[name]).render(chat)) > 1_000_000


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{% set x = messages.append(1) %}",
    "attributes of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "attributes by a format": "{{ '{0.__class__}'.format(1) }}",
    "attributes by a filter": "{{ [1] | map(attribute='__class__') | first }}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    with suppress(InvalidRequest):
        assert ChatTemplate(source, {}).render(CHAT) == "", "what it asked for is undefined"


CODE = "{{ 7 * 7 }}{% for i in range(10 ** 9) %}x{% endfor %}{# gone #}{0.__class__.__mro__}%(a)s"


def test_what_clients_say_is_never_code_of_the_template() -> None:
    source = "{{ messages[0].content }}|{{ tools[0].name }}|{{ documents[0].text }}|{{ said }}"
    options = TemplateOptions(documents=[{"text": CODE}], kwargs={"said": CODE})
    chat = [{"role": "user", "content": CODE}]
    rendered = ChatTemplate(source, {}).render(chat, tools=[{"name": CODE}], options=options)
    assert rendered == "|".join([CODE] * 4)


def test_a_template_failing_on_a_conversation_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.chat: .*user"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render(CHAT)


def test_a_template_states_its_refusal_in_its_own_words() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.chat: .*expected roles that alternate"):
        ChatTemplate("{{ raise_exception('roles that alternate') }}", {}).render(CHAT)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{% include 'x' %}", "{% import 'x' as x %}", "{% nosuch %}"]
)
def test_a_broken_template_is_the_checkpoints_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template cannot be compiled"):
        ChatTemplate(source, {})


def test_an_unknown_filter_is_the_checkpoints_error_when_compiled() -> None:
    with pytest.raises(CheckpointError, match="chat template cannot be compiled: No filter named 'x'"):
        ChatTemplate("{{ 1 | x }}", {}).compile()


BEGUN = [
    "It is",
    "It is ",
    " It is\n",
    "a < b & c  ",
    "<think>\nso\n</think>\n\nIt is",
    "CONTINUE_FINAL_MESSAGE_TAG",
]


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_final_message_goes_on_as_transformers_lets_it(name: str, begun: str) -> None:
    chat = [{"role": "user", "content": "how warm is it?"}, {"role": "assistant", "content": begun}]
    try:
        expected = _continued_by_transformers(FAMILIES[name], chat)
    except ValueError:
        with pytest.raises(InvalidRequest, match="as it stands"):
            _template(FAMILIES[name]).render(chat, False, None, GOES_ON)
    else:
        assert _template(FAMILIES[name]).render(chat, False, None, GOES_ON) == expected


GOES_ON = TemplateOptions(continues_final_message=True)


def test_a_message_that_the_template_drops_cannot_go_on() -> None:
    with pytest.raises(InvalidRequest, match="as it stands"):
        ChatTemplate("{{ messages[0].content }}", {}).render(CHAT, False, None, GOES_ON)


def test_variables_and_documents_reach_the_template() -> None:
    source = "{% for d in documents %}{{ d.title }}: {{ d.text }};{% endfor %}{{ thinking }}{{ depth.a[0] }}"
    options = TemplateOptions(
        documents=[{"title": "a", "text": "b"}],
        kwargs={"thinking": False, "depth": {"a": [1]}, "unused": None},
    )
    assert ChatTemplate(source, {}).render(CHAT, options=options) == "a: b;False1"


HIDING = [
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("bos_token", "eos_token", "raise_exception", "strftime_now", "namespace", "dict", "range", "cycler"),
    *("loop", "self", "tokenize", "conversation", "caller"),
]


@pytest.mark.parametrize("name", HIDING)
def test_no_variable_of_a_client_hides_another(name: str) -> None:
    options = TemplateOptions(kwargs={name: "x"})
    with pytest.raises(InvalidRequest, match=f"'{name}' is not valid, expected names that the template"):
        _template("{{ messages }}").render(CHAT, options=options)


def test_documents_without_a_place_are_refused() -> None:
    options = TemplateOptions(documents=[{"text": "a"}])
    with pytest.raises(InvalidRequest, match="no place for documents"):
        _template("{{ messages }}").render(CHAT, options=options)
