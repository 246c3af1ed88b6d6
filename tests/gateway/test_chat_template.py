"""Templates of checkpoints render as transformers renders them, in a sandbox, and never without end."""

import pytest
from transformers import PreTrainedTokenizerFast

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.gateway.chat_template import ChatTemplate
from tests.gateway.support import byte_level

CHAT = [{"role": "system", "content": "be  brief"}, {"role": "user", "content": 'say "hé" <b>'}]
TEMPLATES = {
    "loop": "{% for m in messages %}\n{{ loop.index }}{{ m['role'] + ':' + m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "loop variables": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "conditions": "{% for m in messages if m.role != 'system' %}{{ m.content }}{% else %}none{% endfor %}",
    "macro": "{% macro show(m) -%}[{{ m.role }}]{%- endmacro %}{% for m in messages %}{{ show(m) ~ '-' ~ 1 }}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson }}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": "{% if tools %}tools{% elif tools is none %}no tools{% endif %}{% if add_generation_prompt %}go{% endif %}",
    "slices": "{{ messages[1:][0].content.split(' ')[-1] }}{{ '-' * 3 }}{{ 2 ** 3 + 7 % 4 }}",
    "recursion": "{% for m in [[1], 2] recursive %}{% if m is iterable %}{{ loop(m) }}{% else %}{{ m }}{% endif %}{% endfor %}",
    "call": "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}{{ messages[0].content }}{% endcall %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str) -> None:
    backend = byte_level()._backend
    reference = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATES[name])
    template = ChatTemplate(TEMPLATES[name], reference.special_tokens_map)
    for add in (True, False):
        expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add)
        assert template.render(CHAT, add) == expected


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested conditions": "{% for a in range(99999) if (range(99999) | list | sum) < 0 %}{% endfor %}",
    "recursive macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "much output": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}
HUGE = {
    "product of a text": "{{ 'x' * 10000000000 }}",
    "product of a list": "{{ ([1] * 10000000000) | length }}",
    "power": "{{ 10 ** 10000000000 }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_goes_on_and_on_is_ended(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"in time|at most"):
        ChatTemplate(source, {}).render(CHAT, timeout_s=0.05)


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_builds_something_huge_is_ended_before(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(source, {}).render(CHAT)


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{% set x = messages.append(1) %}",
    "attributes of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(CHAT)


def test_what_a_template_makes_of_an_unexpected_conversation_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.chat: .*user"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render(CHAT)


def test_a_broken_template_is_the_checkpoints_error() -> None:
    with pytest.raises(CheckpointError, match="chat template cannot be compiled"):
        ChatTemplate("{% for %}", {})
