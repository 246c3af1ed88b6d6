"""Masks let through what the grammar says and nothing else; what is no grammar, or too much of one, is
refused with a word."""

import itertools
import json
from collections.abc import Iterator

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.grammar.matchers import MAX_CACHED_GRAMMARS, Matchers
from pdserve.grammar.messages import Advance, Close, GrammarRefused, Mask, OpenOutput
from pdserve.grammar.sources import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar

from .support import allowed, setup, tokenizer, tokens

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b/c\n"]}},
    "required": ["x", "y"],
}


@pytest.fixture
def matchers() -> Matchers:
    return Matchers(tokenizer(), clock=lambda: 0.0)


def accepts(matchers: Matchers, grammar: str, text: str) -> bool:
    """Whether `text` is a whole output: each token is allowed, and then the end."""
    answer = matchers.handle(OpenOutput(1, grammar))
    assert isinstance(answer, Mask), answer
    for number, token_id in enumerate(tokens(text), start=1):
        if token_id not in allowed(answer.bits):
            matchers.handle(Close(1))
            return False
        reply = matchers.handle(Advance(1, number, token_id))
        assert isinstance(reply, Mask) and reply.num_tokens == number
        answer = reply
    matchers.handle(Close(1))
    return set(setup().eos_token_ids) <= allowed(answer.bits)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (json_schema_grammar(json.dumps(POINT)), '{"x": 1, "y": "a"}', '{"x": 1.5, "y": "a"}'),
        (json_schema_grammar(json.dumps(POINT)), '{\n  "x": -10,\n  "y": "b/c\\n"\n}', '{"y": "a", "x": 1}'),
        (json_object_grammar(), '{"a": [1, {"b": null}]}', "[1]"),
        (regex_grammar(r"[a-c]+/\d{2}"), "abc/42", "abc/4"),
        (regex_grammar("a\nb\\\\|c"), "a\nb\\", "a\nb"),
        (choice_grammar(['say "yes"', "no\nway\\", "🙂"]), "no\nway\\", "no"),
        (choice_grammar(['say "yes"', "no\nway\\", "🙂"]), "🙂", "yes"),
        (choice_grammar([f"number {i}" for i in range(3000)] + ["number"]), "number", "numbe"),
        ('start: a+ "."\na: "x" | "y"', "xyx.", "xyz."),
    ],
)
def test_an_output_is_complete_where_its_grammar_is(
    matchers: Matchers, grammar: str, good: str, bad: str
) -> None:
    assert accepts(matchers, grammar, good)
    assert not accepts(matchers, grammar, bad)


def test_whitespace_between_json_tokens_has_an_end(matchers: Matchers) -> None:
    for good in ("", " ", "\n", "\n\t", "\n" + " " * 40):
        assert accepts(matchers, json_object_grammar(), "{" + good + "}")
    for bad in ("  ", "\n\n", "\n" + " " * 41):
        assert not accepts(matchers, json_object_grammar(), "{" + bad + "}")


def test_only_the_end_may_follow_a_complete_output(matchers: Matchers) -> None:
    answer = matchers.handle(OpenOutput(1, regex_grammar("ab"), tuple(tokens("ab"))))
    assert isinstance(answer, Mask) and allowed(answer.bits) == set(setup().eos_token_ids)


def test_an_output_resumed_half_way_gets_the_same_masks(
    matchers: Matchers,
) -> None:
    grammar, text = json_schema_grammar(json.dumps(POINT)), tokens('{"x": 17, "y": "b/')
    first = matchers.handle(OpenOutput(1, grammar))
    assert isinstance(first, Mask)
    for number, token_id in enumerate(text, start=1):
        followed = matchers.handle(Advance(1, number, token_id))
    taken_up = matchers.handle(OpenOutput(2, grammar, tuple(text)))
    assert isinstance(followed, Mask) and isinstance(taken_up, Mask)
    assert followed.bits == taken_up.bits


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("", "Empty grammar"),
        ("start: nothing", "unknown name"),
        ("hello", "Expected"),
        (regex_grammar("((("), "error: unclosed group"),
        (regex_grammar("a(?=b)"), "look-around"),
        (regex_grammar("(" * 10_000), "invalid regex"),
        ('start: A B\nA: /a+/ & /b+/\nB: "x"', "no text fits it"),
        (json_schema_grammar('{"type": "point"}'), "Invalid type: point"),
        (json_schema_grammar('{"$ref": "http://169.254.169.254/latest"}'), "does not fetch resources"),
        (json_schema_grammar('{"type": "array", "uniqueItems": true}'), "Unimplemented"),
        (
            json_schema_grammar(
                json.dumps({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(3000)}})
            ),
            "items; max is",
        ),
    ],
)
def test_an_invalid_or_excessive_grammar_is_refused_with_a_reason(
    matchers: Matchers, grammar: str, why: str
) -> None:
    answer = matchers.handle(OpenOutput(1, grammar, probe=True))
    assert isinstance(answer, GrammarRefused) and why in answer.why
    assert "\n" not in answer.why and len(answer.why) < 500


@pytest.mark.parametrize("schema", ["", "[]", "3", "true", "{", '{"a": 1}{', "[" * 100_000, '{"a": ' * 5_000])
def test_a_schema_is_a_json_object(schema: str) -> None:
    with pytest.raises(InvalidRequest, match="a JSON schema, an object"):
        json_schema_grammar(schema)


def test_a_token_that_was_not_allowed_ends_it(matchers: Matchers) -> None:
    matchers.handle(OpenOutput(1, regex_grammar("ab")))
    answer = matchers.handle(Advance(1, 1, tokens("z")[0]))
    assert isinstance(answer, GrammarRefused)


def test_an_output_that_exhausts_its_mask_time_is_refused() -> None:
    clock: Iterator[float] = itertools.count(step=0.3)  # the time of every job
    matchers = Matchers(tokenizer(), clock=lambda: next(clock))
    assert isinstance(matchers.handle(OpenOutput(1, regex_grammar("a+"))), Mask)
    answer = matchers.handle(Advance(1, 1, tokens("a")[0]))
    assert isinstance(answer, GrammarRefused) and "too long" in answer.why


def test_a_grammar_is_compiled_again_only_when_many_others_came_between(matchers: Matchers) -> None:
    for number in range(MAX_CACHED_GRAMMARS + 5):
        matchers.handle(OpenOutput(number, regex_grammar(f"a{{{number}}}")))
    assert len(matchers._compiled) == MAX_CACHED_GRAMMARS
    assert isinstance(matchers.handle(OpenOutput(-1, regex_grammar("a{0}"))), Mask)
