"""The possible outputs of a model with tools: a grammar for llguidance, in its dialect of Lark.

Each call is exactly as the chat template shows it, down to the spaces; its arguments follow their schema. A
marker that is one token of the vocabulary must be that token, as the model has learnt it. Text cannot contain
a marker, however it is spelled, so a marker always begins a call."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...core.errors import InvalidRequest
from .formats import CLOSING, PYTHON_TAG, ToolFormat
from .offer import OfferedTool, OfferedTools

# as templates write JSON, or without its spaces; with free white space a model could continue it for ever
_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_PLACE = re.compile(r"at (\d+)\(\d+\): (.*)")  # in llguidance's messages: line and column
_ARGUMENTS = re.compile(r"arguments_(\d+): ")
_COMPILING = "failed to compile JSON schema: "


def tool_grammar(
    offer: OfferedTools, form: ToolFormat, added: Mapping[str, int], eos_token_ids: Collection[int]
) -> str:
    """Returns the grammar of all answers. `added` are the added tokens of the tokenizer: a marker may be one
    of them."""

    def mark(marker: str) -> str:
        return f"<[{added[marker]}]>" if marker in added else json.dumps(marker)

    rules = ["start: calls" if offer.must_call else "start: said | calls"]
    match form:
        case ToolFormat.HERMES:
            body = rf'"\n" object "\n" {mark(CLOSING)}'
            more = rf'("\n" {mark(form.marker)} {body})*' if offer.is_parallel else ""
            rules.append(f"calls: opening {body} {more}")
        case ToolFormat.MISTRAL:
            more = '(", " object)*' if offer.is_parallel else ""
            rules.append(f'calls: opening " "? "[" object {more} "]"')
        case ToolFormat.LLAMA3:
            rules.append(f"calls: {mark(PYTHON_TAG)}? object" if PYTHON_TAG in added else "calls: object")
    if offer.must_call and form.marker:
        rules.append(f"opening: {mark(form.marker)}")
    elif not offer.must_call:
        others = sorted(
            set(added.values()) - set(eos_token_ids) - {added.get(marker) for marker in form.markers}
        )
        rules += _said(form.marker, added.get(form.marker), others)
    return "\n".join([*rules, *_objects(offer, form.arguments_key)]) + "\n"


def _said(marker: str, marker_id: int | None, others: Sequence[int]) -> list[str]:
    """Returns the rules of text, and of text up to the first call. Text may include other added tokens, such
    as those around reasoning; two TEXTs are never adjacent, as a marker could be spelled across them."""
    token = f"<[{','.join(map(str, others))}]>"
    if not marker:
        more = f" ({token} REST?)*" if others else ""
        return [f"said: (TEXT{more})?", "TEXT: /[^{](?s:.*)/", *(["REST: /(?s:.+)/"] if others else [])]
    before = f"(TEXT? {token})* " if others else ""
    text = f"TEXT: /(?s:.+)/ & ~/(?s:.*){_escaped(marker)}(?s:.*)/"
    if marker_id is not None:
        return [f"said: {before}TEXT?", f"opening: said <[{marker_id}]>", text]
    # as a text is matched greedily, it would swallow the marker
    return [
        f"said: {before}TEXT?",
        f"opening: {before}last",
        f"last[lazy]: /(?s:.*){_escaped(marker)}/",
        text,
    ]


def _escaped(marker: str) -> str:
    return marker.replace("[", r"\[").replace("]", r"\]")


def _objects(offer: OfferedTools, arguments_key: str) -> Iterator[str]:
    """Returns the rules of a call's JSON, for any of the functions."""
    yield "object: " + " | ".join(f"object_{index}" for index in range(len(offer.callable)))
    for index, tool in enumerate(offer.callable):
        beginning = json.dumps(f'{{"name": "{tool.name}", "{arguments_key}": ')
        yield f'object_{index}: {beginning} arguments_{index} "}}"'
        yield f"arguments_{index}: %json {arguments_schema(tool)}"


def arguments_schema(tool: OfferedTool) -> str:
    """Returns the schema of a call's arguments for llguidance: an object, whatever its other keywords are."""
    parameters: Mapping[str, Any] = (
        {"additionalProperties": False} if tool.parameters is None else tool.parameters
    )
    options = _SPACING | {"lenient": not tool.is_strict}
    return json.dumps({"type": "object"} | dict(parameters) | {"x-guidance": options})


def refusal(offer: OfferedTools, grammar: str, why: str) -> InvalidRequest:
    """Returns the refusal of a request whose grammar llguidance rejects for the reason `why`: names a tool's
    schema, if `why` does."""
    place = _PLACE.match(why)
    lines = grammar.splitlines()
    rule = (
        _ARGUMENTS.match(lines[int(place[1]) - 1])
        if place is not None and int(place[1]) <= len(lines)
        else None
    )
    if place is None or rule is None:
        return InvalidRequest("tools", f"{len(offer.tools)} tool(s)", f"schemas that can be followed ({why})")
    tool = offer.callable[int(rule[1])]
    expected = f"a schema that can be followed ({place[2].removeprefix(_COMPILING)})"
    return InvalidRequest(f"tools[{offer.tools.index(tool)}].parameters", tool.parameters, expected)
