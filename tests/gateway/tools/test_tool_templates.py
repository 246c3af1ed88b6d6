"""Templates receive tools, calls and results in the form that transformers gives them."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pdserve.gateway.text.chat_template import ChatTemplate
from pdserve.gateway.tools.formats import ToolFormat
from tests.gateway.support import Built, byte_level
from tests.gateway.tools.models import TEMPLATES, openai_tools

CHAT: list[dict[str, Any]] = [{"role": "user", "content": 'say "hé" <b>'}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "a23456789",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": [1]}},
            }
        ],
    },
    {"role": "tool", "content": '{"sky": "<blue>"}', "tool_call_id": "a23456789", "name": "get_weather"},
    {"role": "user", "content": "and then?"},
]


@pytest.mark.parametrize("form", ToolFormat)
@pytest.mark.parametrize("tools", [None, openai_tools()])
def test_tools_and_calls_render_as_transformers_renders_them(
    form: ToolFormat, tools: list[dict[str, Any]] | None
) -> None:
    source, backend = TEMPLATES[form], byte_level()._backend
    reference = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<s>", chat_template=source
    )
    template = ChatTemplate(source, reference.special_tokens_map)
    assert template.takes_tools
    for chat in (CHAT, CALLED):
        expected = reference.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert template.render(chat, tools=tools) == expected
        assert ("get_weather" in expected) == (tools is not None or chat is CALLED)


def test_a_checkpoint_may_have_a_template_of_its_own_for_tools() -> None:
    templates = {
        "default": "{{ messages[0].content }}",
        "tool_use": '{{ tools | length }}<tool_call>"arguments"',
    }
    tokenizer = Built(
        PreTrainedTokenizerFast(tokenizer_object=byte_level()._backend, chat_template=templates)
    )
    assert tokenizer.templates.render(CHAT) == CHAT[0]["content"]
    assert tokenizer.templates.render(CHAT, tools=openai_tools()) == '2<tool_call>"arguments"'
    assert (tokenizer.templates.takes_tools, tokenizer.templates.tool_format) == (True, ToolFormat.HERMES)


def test_a_template_takes_tools_where_it_names_them() -> None:
    assert not ChatTemplate("{{ messages[0].tools }}", {}).takes_tools
    assert ChatTemplate("{% if tools is defined %}{% set tools = none %}{% endif %}", {}).takes_tools
