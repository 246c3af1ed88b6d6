"""However an answer's text is split, the same text and calls are parsed from it, as soon as they are
certain."""

import json
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings, strategies as st

from pdserve.gateway.tools.formats import ToolFormat, tool_format
from pdserve.gateway.tools.parser import Arguments, CallBegins, CallEnds, Text, ToolEvent, ToolParser
from tests.gateway.tools.models import TEMPLATES, written

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SEPARATORS = st.sampled_from([(", ", ": "), (",", ":")])
ARGUMENTS = st.builds(
    lambda value, separators, ascii: json.dumps(value, separators=separators, ensure_ascii=ascii),
    st.dictionaries(st.text() | st.sampled_from(["</tool_call>", '"}', "\\"]), JSON, max_size=4),
    SEPARATORS,
    st.booleans(),
)
NAMES = st.text("abcXYZ019_-", min_size=1, max_size=64)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3)
TEXTS = st.lists(
    st.text(max_size=5) | st.sampled_from(["<tool_call", "[TOOL_CALLS", "<", "\n", "[", "{", "TOOL"])
).map("".join)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def read(form: ToolFormat, texts: list[str]) -> list[ToolEvent]:
    parser = ToolParser(form, lambda index: f"id{index}")
    return [event for text in texts for event in parser.push(text)] + parser.flush()


def joined(events: list[ToolEvent]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the text, and id, name and arguments of each call; checks that calls follow each other and the
    text."""
    text, is_open = "", False
    calls: list[tuple[str, str, str]] = []
    for event in events:
        match event:
            case Text(part):
                assert not calls
                assert part
                text += part
            case CallBegins(index, call_id, name):
                assert not is_open
                assert index == len(calls)
                calls.append((call_id, name, ""))
                is_open = True
            case Arguments(index, part):
                assert is_open
                assert index == len(calls) - 1
                assert part
                calls[-1] = (*calls[-1][:2], calls[-1][2] + part)
            case CallEnds(index):
                assert is_open
                is_open = False
    assert not is_open
    return text, calls


@settings(deadline=None)
@given(st.sampled_from(ToolFormat), TEXTS, CALLS, st.lists(st.integers(min_value=0), max_size=12))
def test_text_and_calls_are_read_wherever_they_are_cut(
    form: ToolFormat, text: str, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    assume(not form.marker or form.marker not in text)
    if form is ToolFormat.LLAMA3:
        text, calls = ("" if calls else text.lstrip("{")), calls[:1]
    parsed = read(form, pieces(written(form, calls, text), cuts))
    assert joined(parsed) == (
        text,
        [(f"id{index}", name, arguments) for index, (name, arguments) in enumerate(calls)],
    )


@pytest.mark.parametrize("form", ToolFormat)
def test_text_and_calls_are_read_letter_by_letter(form: ToolFormat) -> None:
    calls = [("a", '{"x": "\\\\\\"}]<tool_call>[TOOL_CALLS]", "y": [{}, [1]]}'), ("b", "{}")][
        : 1 if form is ToolFormat.LLAMA3 else 2
    ]
    text = "" if form is ToolFormat.LLAMA3 else "so\n"
    parsed = joined(read(form, list(written(form, calls, text))))
    assert parsed == (text, [(f"id{index}", *call) for index, call in enumerate(calls)])


def test_arguments_are_emitted_as_they_arrive() -> None:
    parser = ToolParser(ToolFormat.HERMES, str)
    assert parser.push("Wait.") == [Text("Wait.")]
    assert parser.push('\n<tool_call>\n{"name": "f", "arg') == []
    assert parser.push('uments": ') == [CallBegins(0, "0", "f")]
    assert parser.push('{"a": "') == [Arguments(0, '{"a": "')]
    assert parser.push("}") == [Arguments(0, "}")]
    assert not parser.has_called
    assert parser.push('"}}\n') == [Arguments(0, '"}'), CallEnds(0)]
    assert parser.has_called


def test_only_what_may_be_a_marker_is_held_back() -> None:
    parser = ToolParser(ToolFormat.HERMES, str)
    assert parser.push("a\n<tool") == [Text("a")]
    assert parser.push("box\n") == [Text("\n<toolbox")]
    assert parser.push("\n") == [Text("\n")]
    assert parser.flush() == [Text("\n")]


@pytest.mark.parametrize("form", ToolFormat)
def test_a_truncated_call_is_not_text(form: ToolFormat) -> None:
    whole = written(form, [("look", '{"a": "b"}')])
    for end in range(len(form.marker) or 1, len(whole)):
        events = read(form, [whole[:end]])
        assert not any(isinstance(event, Text) for event in events)


@pytest.mark.parametrize("form", ToolFormat)
def test_the_retained_text_does_not_grow(form: ToolFormat) -> None:
    parser = ToolParser(form, str)
    parser.push(written(form, [("a", '{"x": "')]).partition("}")[0])
    for piece in ["word "] * 1000 + ['"}'] + ["\n"] * 1000:
        parser.push(piece)
        assert len(parser._rest) < 16


def test_the_format_is_detected_from_the_template() -> None:
    for form, template in TEMPLATES.items():
        assert tool_format(template) is form
    assert tool_format("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert (
        tool_format("{{ tools }}<tool_call>\n<function=name>\n<parameter=a>{{ tool_call.arguments }}") is None
    )
    assert tool_format("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}") is None
