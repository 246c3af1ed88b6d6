"""Constraints on the output: from a client's message to the grammar that workers follow."""

from typing import Protocol

from ..core.config import LimitsSection
from ..core.errors import MISSING, InvalidRequest
from ..grammar.checker import GrammarChecker
from ..grammar.sources import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar
from ..proto import pdserve_pb2 as pb

KINDS = "one of json_object, json_schema, regex, grammar or choice"


class GrammarCheck(Protocol):
    """Builds grammars that workers can follow."""

    async def grammar(self, message: pb.Constraint, client: str) -> str:
        """Raises InvalidRequest, QueueFull or NoWorkerAvailable."""
        ...

    async def why_not(self, grammar: str, client: str) -> str | None:
        """Returns why a grammar of our own making cannot be followed; None if it can. Raises QueueFull or
        NoWorkerAvailable."""
        ...


class Constraints:
    """Implements `GrammarCheck` with llguidance. The message has passed `check_constraint`."""

    def __init__(self, checker: GrammarChecker) -> None:
        self._checker = checker

    async def grammar(self, message: pb.Constraint, client: str) -> str:
        grammar = grammar_of(message)
        why = await self.why_not(grammar, client)
        if why is not None:
            kind = message.WhichOneof("kind")
            assert kind is not None
            raise InvalidRequest(f"constraint.{kind}", _shown(message), f"what can be followed ({why})")
        return grammar

    async def why_not(self, grammar: str, client: str) -> str | None:
        return await self._checker.check(grammar, client)


def constraint_problems(message: pb.Constraint, limits: LimitsSection) -> list[InvalidRequest]:
    """Returns what `check_constraint` raises."""
    try:
        check_constraint(message, limits)
    except InvalidRequest as error:
        return [error]
    return []


def check_constraint(message: pb.Constraint, limits: LimitsSection) -> None:
    """Raises InvalidRequest for errors that need no compilation."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("constraint", MISSING, KINDS)
    if kind == "json_object" and not message.json_object:
        raise InvalidRequest("constraint.json_object", False, "true, or no constraint")
    if kind == "choice":
        texts = message.choice.texts
        if not texts:
            raise InvalidRequest("constraint.choice", [], "at least one text")
        for index, text in enumerate(texts):
            if not text:
                raise InvalidRequest(f"constraint.choice[{index}]", text, "a text that is not empty")
    if kind == "grammar" and message.grammar.lstrip().startswith(
        "{"
    ):  # llguidance would take it for its own format
        raise InvalidRequest("constraint.grammar", message.grammar, "a grammar in Lark's syntax")
    if message.ByteSize() > limits.max_constraint_bytes:
        raise InvalidRequest(
            f"constraint.{kind}",
            f"{message.ByteSize()} bytes",
            f"at most {limits.max_constraint_bytes} bytes",
        )


def grammar_of(message: pb.Constraint) -> str:
    """Returns the constraint's text, which may not be a valid grammar. Raises InvalidRequest if it is not a
    JSON schema."""
    match message.WhichOneof("kind"):
        case "json_schema":
            return json_schema_grammar(message.json_schema)
        case "regex":
            return regex_grammar(message.regex)
        case "grammar":
            return message.grammar
        case "choice":
            return choice_grammar(message.choice.texts)
    return json_object_grammar()


def _shown(message: pb.Constraint) -> object:
    """Returns the constraint that the client asked for."""
    kind = message.WhichOneof("kind")
    return list(message.choice.texts[:8]) if kind == "choice" else getattr(message, kind or "")
