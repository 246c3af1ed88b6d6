"""A client's constraint as a grammar in llguidance's text form, the only form that workers receive.

Nothing is compiled here: `checker` finds out whether a grammar is valid and affordable.
"""

from collections.abc import Sequence

import msgspec
from llguidance import LLMatcher

from ..core.errors import InvalidRequest

# Between the tokens of JSON: nothing, a space, or a new line and its indentation. Without a bound a model may
# go on with
# blanks for ever.
WHITESPACE = r"( |\n[ \t]{0,40})?"


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar('{"type": "object"}')


def json_schema_grammar(schema: str) -> str:
    """JSON that fits a schema, given as its text. Raises InvalidRequest when it is no JSON object."""
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise InvalidRequest(
            "constraint.json_schema", schema, f"a JSON schema, an object: {error}"
        ) from error


def regex_grammar(pattern: str) -> str:
    """Texts that a regular expression, in the syntax of Rust's regex, matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """One of several texts, in Lark's syntax."""
    return "start: CHOICE\nCHOICE: " + " | ".join(msgspec.json.encode(choice).decode() for choice in choices)
