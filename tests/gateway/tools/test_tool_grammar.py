"""A model with tools writes text, calls that fit their schemas, and nothing else: for each family, checked by
llguidance itself."""

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

from pdserve.gateway.tools.formats import ToolFormat
from pdserve.gateway.tools.grammar import refusal, tool_grammar
from pdserve.gateway.tools.offer import OfferedTool, OfferedTools
from pdserve.gateway.tools.parser import Arguments, CallBegins, CallEnds, Text, ToolParser
from tests.gateway.tools.models import MODELS, TOOLS, WEATHER, eos_of, for_grammars, offer, written

SUNNY = ("get_weather", '{"city": "Köln <x>", "unit": "C", "days": [1, 2]}')
COMPACT = ("get_weather", '{"city":"[]{}\\"","days":[]}')
STOP = ("stop", "{}")
WRONG = {
    "another function": ("get_time", "{}"),
    "a missing argument": ("get_weather", '{"unit": "C"}'),
    "an argument of another type": ("get_weather", '{"city": 1}'),
    "an argument that is not one of its values": ("get_weather", '{"city": "a", "unit": "K"}'),
    "an argument beyond a definition": ("get_weather", '{"city": "a", "days": [-1]}'),
    "arguments of a function without any": ("stop", '{"city": "a"}'),
    "white space": ("get_weather", '{"city":  "a"}'),
    "no object": ("stop", "[]"),
}


def grammar_of(model: str, offered: OfferedTools) -> str:
    tokenizer = MODELS[model]()
    assert tokenizer.templates.tool_format is not None
    return tool_grammar(offered, tokenizer.templates.tool_format, tokenizer.added_tokens, [eos_of(tokenizer)])


def matcher(model: str, offered: OfferedTools) -> LLMatcher:
    found = LLMatcher(for_grammars(model), grammar_of(model, offered), log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def accepts(model: str, offered: OfferedTools, text: str) -> bool:
    """Returns whether `text` is a whole answer: all of its tokens are allowed, and then its end."""
    token_ids = [*MODELS[model]().encode(text, add_special_tokens=False), eos_of(MODELS[model]())]
    return matcher(model, offered).validate_tokens(token_ids) == len(token_ids)


def form_of(model: str) -> ToolFormat:
    form = MODELS[model]().templates.tool_format
    assert form is not None
    return form


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("call", [SUNNY, COMPACT, STOP])
def test_a_call_is_accepted_whether_required_or_not(model: str, call: tuple[str, str]) -> None:
    for must_call in (True, False):
        assert accepts(model, offer(must_call=must_call), written(form_of(model), [call]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_calls_are_not_accepted(model: str, wrong: str) -> None:
    for must_call in (True, False):
        assert not accepts(model, offer(must_call=must_call), written(form_of(model), [WRONG[wrong]]))


@pytest.mark.parametrize("model", MODELS)
def test_text_may_replace_calls_unless_they_are_required(model: str) -> None:
    for text in ("", "It is sunny.", "a\n\n{}", "1 < 2", "<tool_call", "[TOOL_", "\n"):
        assert accepts(model, offer(), text), text
        assert not accepts(model, offer(must_call=True), text), text


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"llama3"}))
def test_text_may_precede_calls_but_not_follow_them(model: str) -> None:
    text = written(form_of(model), [SUNNY, STOP], "I look.")
    assert accepts(model, offer(), text)
    assert not accepts(model, offer(must_call=True), text)
    assert not accepts(model, offer(), text + " There.")


@pytest.mark.parametrize("model", MODELS)
def test_other_added_tokens_are_text_like_any_other(model: str) -> None:
    """Tokens like those around models' reasoning."""
    form, thought = form_of(model), "a<think>b</think>\n\nc"
    assert {"<think>", "</think>"} <= MODELS[model]().added_tokens.keys()
    for text in (thought, thought + "</think>"):
        assert accepts(model, offer(), text)
        assert not accepts(model, offer(must_call=True), text)
    assert accepts(model, offer(), written(form, [STOP], thought)) or form is ToolFormat.LLAMA3


def test_no_token_allows_spelling_a_marker_in_text() -> None:
    tokenizer = MODELS["qwen"]()
    spelled = [
        token_id for piece in ("<think>", "<", "tool_call>", " x") for token_id in tokenizer.encode(piece)
    ]
    assert matcher("qwen", offer()).validate_tokens(spelled) < len(spelled)


def test_llama3_calls_or_talks() -> None:
    call = written(ToolFormat.LLAMA3, [STOP])
    assert accepts("llama3", offer(must_call=True), "<|python_tag|>" + call)
    assert accepts("llama3", offer(), "well, " + call)  # which is text
    assert not accepts("llama3", offer(), call + call)
    assert not accepts("llama3", offer(), "<think>" + call)  # whose text would look like a call
    assert not accepts("llama3", offer(), '{"a": 1}')


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"llama3"}))
def test_several_calls_are_accepted_only_if_allowed(model: str) -> None:
    text = written(form_of(model), [SUNNY, STOP, STOP])
    assert accepts(model, offer(must_call=True), text)
    assert not accepts(model, offer(must_call=True, is_parallel=False), text)
    assert accepts(model, offer(must_call=True, is_parallel=False), written(form_of(model), [STOP]))


@pytest.mark.parametrize("model", MODELS)
def test_only_the_chosen_function_may_be_called(model: str) -> None:
    chosen = offer(chosen=TOOLS[1:])
    assert accepts(model, chosen, written(form_of(model), [STOP]))
    assert not accepts(model, chosen, written(form_of(model), [SUNNY]))
    assert not accepts(model, chosen, "")


def test_a_marker_that_is_a_token_is_that_token() -> None:
    tokenizer, call = MODELS["qwen"](), written(ToolFormat.HERMES, [STOP])
    spelled = [*tokenizer.encode("<"), *tokenizer.encode(call[1:])]
    assert tokenizer.decode(spelled) == call
    assert matcher("qwen", offer()).validate_tokens(spelled) < len(spelled)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("must_call", [True, False])
def test_random_output_is_text_and_valid_calls(model: str, must_call: bool) -> None:
    """Random allowed tokens: none of them leads to a dead end, and the parsed result fits the schemas."""
    rng = random.Random(f"{model} {must_call}")
    tokenizer, eos = MODELS[model](), eos_of(MODELS[model]())
    likely = [
        token_id for token_id in range(eos, 400) if tokenizer.piece(token_id) in {*'{}[]":,0', "</tool_call>"}
    ] + [eos]
    num_calls = 0
    for _ in range(15):
        walk = matcher(model, offer(must_call=must_call))
        token_ids: list[int] = []
        while not walk.is_stopped() and len(token_ids) < 200:
            bits = np.unpackbits(np.frombuffer(walk.compute_bitmask(), dtype=np.uint8), bitorder="little")
            preferred = [token_id for token_id in likely if bits[token_id]] if rng.random() < 0.5 else []
            token_ids.append(int(rng.choice(preferred or list(np.flatnonzero(bits)))))
            assert walk.consume_token(token_ids[-1]), walk.get_error()
        num_calls += check_calls(model, token_ids, is_whole=token_ids[-1] == eos)
    assert num_calls or not must_call


def check_calls(model: str, token_ids: list[int], is_whole: bool) -> int:
    """Returns the number of complete calls."""
    tokenizer = MODELS[model]()
    shown = [
        t
        for t in token_ids
        if tokenizer.has_text(t) or t == tokenizer.added_tokens.get(form_of(model).marker)
    ]
    parser = ToolParser(form_of(model), str)
    events = parser.push(tokenizer.decode(shown))
    texts = {event.index: "" for event in events if isinstance(event, CallBegins)}
    names = {event.index: event.name for event in events if isinstance(event, CallBegins)}
    for event in events:
        if isinstance(event, Arguments):
            texts[event.index] += event.text
    complete = [event.index for event in events if isinstance(event, CallEnds)]
    schemas = {tool.name: tool.parameters or {"maxProperties": 0} for tool in TOOLS}
    for index in complete:
        jsonschema.validate(json.loads(texts[index]), schemas[names[index]])
    if is_whole:
        assert len(complete) == len(names)
        assert parser.has_called or not any(not isinstance(event, Text) for event in events)
    return len(complete)


BAD_SCHEMAS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown type": ({"properties": {"a": {"type": "text"}}}, "Invalid type"),
    "a reference to nothing": ({"$ref": "#/$defs/a"}, "does not exist"),
    "a pattern that is none": ({"properties": {"a": {"type": "string", "pattern": "("}}}, "regex"),
    "a reference to itself alone": ({"$ref": "#"}, "circular references"),
    "combinations without end": (
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(6)]} for i in range(12)
            ]
        },
        "too large",
    ),
    "nothing that fits": ({"properties": {"a": False}, "required": ["a"]}, "nsatisfiable"),
}


def refused(tool: OfferedTool) -> str:
    offered = offer([*TOOLS, tool])
    grammar = grammar_of("qwen", offered)
    why = LLMatcher.validate_grammar(grammar, for_grammars("qwen"))
    return str(refusal(offered, grammar, why.partition("\n")[0])) if why else ""


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_schema_that_cannot_be_followed_is_named(name: str) -> None:
    schema, why = BAD_SCHEMAS[name]
    refusal = refused(OfferedTool(name="bad", description="", parameters=schema, is_strict=False))
    assert refusal.startswith("tools[2].parameters: ")
    assert why in refusal


def test_a_schema_that_contains_itself_can_be_followed() -> None:
    schema = {"properties": {"next": {"$ref": "#"}, "value": {"type": "integer"}}}
    assert refused(OfferedTool(name="list", description="", parameters=schema, is_strict=True)) == ""


@pytest.mark.parametrize(
    "schema", [{"properties": {"a": {"type": "string", "format": "colour"}}}, {"not": {"required": ["a"]}}]
)
def test_unsupported_schema_keywords_are_refused_only_in_strict_mode(
    schema: dict[str, object],
) -> None:
    assert refused(OfferedTool(name="lax", description="", parameters=schema, is_strict=False)) == ""
    assert "tools[2].parameters" in refused(
        OfferedTool(name="strict", description="", parameters=schema, is_strict=True)
    )


def test_a_grammar_refused_as_a_whole_is_reported_as_a_whole() -> None:
    error = refusal(offer(), grammar_of("qwen", offer()), "it takes too long to follow")
    assert str(error).startswith(
        "tools: '2 tool(s)' is not valid, expected schemas that can be followed (it takes too long"
    )


def test_parameters_are_an_object_whatever_their_schema_leaves_open() -> None:
    tools = [OfferedTool(name="any", description="", parameters={"description": "anything"}, is_strict=True)]
    assert accepts("qwen", offer(tools), written(ToolFormat.HERMES, [("any", '{"a": [{}]}')]))
    assert not accepts("qwen", offer(tools), written(ToolFormat.HERMES, [("any", "1")]))
    assert WEATHER["required"] == ["city"]
