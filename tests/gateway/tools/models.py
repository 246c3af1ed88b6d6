"""Tokenizers of models that call tools: templates in the style of each family, with the markers of their
vocabularies."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.tools.formats import ToolFormat
from pdserve.gateway.tools.offer import OfferedTool, OfferedTools
from tests.gateway.support import EOS, Built, byte_level, metaspace_with_bytes

HERMES = """
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\\n\\n' if messages[0].role == 'system' }}# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{- '\\n' + m.content if m.content }}
{%- for call in m.tool_calls or [] %}
{%- if call.function %}{% set call = call.function %}{% endif %}
{{- '\\n<tool_call>\\n' }}{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' and tools is not none and loop.first %}<|start_header_id|>user<|end_header_id|>

Answer with {"name": function name, "parameters": dictionary of argument name and its value}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{{ m.content | trim }}<|eot_id|>
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ {'output': m.content} | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools is not none and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids of 9 characters') }}{% endif %}
{{- (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ ', ' if not loop.last }}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %}{{ ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}"""
TEMPLATES = {ToolFormat.HERMES: HERMES, ToolFormat.LLAMA3: LLAMA3, ToolFormat.MISTRAL: MISTRAL}


def _model(
    base: Tokenizer, template: str, special: Sequence[str] = (), added: Sequence[str] = (), **names: str
) -> Built:
    backend = Backend.from_str(base.to_json())
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    backend.add_tokens([AddedToken(name, special=False) for name in (*added, "<think>", "</think>")])
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names))


@cache
def qwen() -> Built:
    """Its markers are added tokens, but not special ones."""
    return _model(byte_level(), HERMES, added=["<tool_call>", "</tool_call>"], eos_token=EOS)


@cache
def hermes() -> Built:
    """Its markers are text like any other."""
    return _model(byte_level(), HERMES, eos_token=EOS)


@cache
def llama3() -> Built:
    """It may put a special token before a call."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    return _model(byte_level(), LLAMA3, special=headers, eos_token="<|eot_id|>")


@cache
def mistral() -> Built:
    """Its marker is a special token, in SentencePiece's kind of vocabulary."""
    return _model(
        metaspace_with_bytes(), MISTRAL, special=["[TOOL_CALLS]", "[INST]"], bos_token="<s>", eos_token="</s>"
    )


@cache
def tekken() -> Built:
    """The same in a vocabulary of bytes, where the marker is not a special token."""
    return _model(byte_level(), MISTRAL, added=["[TOOL_CALLS]"], eos_token=EOS, bos_token="<|im_start|>")


MODELS = {"qwen": qwen, "hermes": hermes, "llama3": llama3, "mistral": mistral, "tekken": tekken}


def eos_of(tokenizer: Built) -> int:
    token_id = tokenizer.pretrained.eos_token_id
    assert isinstance(token_id, int)
    return token_id


@cache
def for_grammars(name: str) -> LLTokenizer:
    """Returns the model's tokenizer as the grammar process has it."""
    tokenizer = MODELS[name]()
    return LLTokenizer(tokenizer.to_json(), eos_token=eos_of(tokenizer))


def written(form: ToolFormat, calls: Sequence[tuple[str, str]], text: str = "") -> str:
    """Returns text, and calls of these names and arguments, as a model writes them."""
    objects = [f'{{"name": "{name}", "{form.arguments_key}": {arguments}}}' for name, arguments in calls]
    match form:
        case ToolFormat.HERMES:
            calls_text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)
            return f"{text}\n{calls_text}" if text and calls_text else text + calls_text
        case ToolFormat.MISTRAL:
            return text + (f"[TOOL_CALLS][{', '.join(objects)}]" if objects else "")
        case ToolFormat.LLAMA3:
            return text + "".join(objects)


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city"],
    "$defs": {"days": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3}},
}
TOOLS = (
    OfferedTool(
        name="get_weather", description="The weather, in a city", parameters=WEATHER, is_strict=False
    ),
    OfferedTool(name="stop", description="", parameters=None, is_strict=False),
)


def offer(
    tools: Sequence[OfferedTool] = TOOLS,
    *,
    must_call: bool = False,
    is_parallel: bool = True,
    chosen: Sequence[OfferedTool] | None = None,
) -> OfferedTools:
    return OfferedTools(
        tools=tuple(tools),
        callable=tuple(tools if chosen is None else chosen),
        must_call=must_call or chosen is not None,
        is_parallel=is_parallel,
    )


def openai_tools() -> list[Any]:
    """Returns TOOLS as clients send them."""
    return list(json.loads(json.dumps([tool.for_template() for tool in TOOLS])))
