"""Constraints on the output: translates OpenAI's `response_format` or vLLM's `structured_outputs` to the
message of the gRPC API."""

import json
from typing import Any

from ...core.errors import MISSING, InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..constraint import KINDS
from .schema import GenerationBody, ResponseFormat, StructuredOutputs

# vLLM's older names of the fields of `StructuredOutputs`
GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def constraint_message(body: GenerationBody) -> pb.Constraint | None:
    """Returns None if the output is unconstrained. Raises InvalidRequest."""
    given: dict[str, pb.Constraint] = {}
    if body.response_format is not None and (constraint := _of_format(body.response_format)) is not None:
        given["response_format"] = constraint
    if body.structured_outputs is not None:
        given["structured_outputs"] = _of_outputs(body.structured_outputs)
    if not body.model_fields_set.isdisjoint(GUIDED):
        for name in (name for name in GUIDED if name in body.model_fields_set):
            given[name] = _of_kind(GUIDED[name], getattr(body, name))
    if len(given) > 1:
        first, *_, last = given
        value = body.model_dump(include={last}, exclude_unset=True, by_alias=True)[last]
        raise InvalidRequest(last, value, f"nothing beside {first}")
    return next(iter(given.values()), None)


def constraint_field(body: GenerationBody) -> str:
    """Returns what its client calls the constraint; empty if there is none."""
    if body.response_format is not None and body.response_format.type != "text":
        return "response_format"
    if body.structured_outputs is not None:
        kind = next(iter(body.structured_outputs.model_fields_set), "")
        return f"structured_outputs.{'json' if kind == 'json_schema' else kind}".rstrip(".")
    given = body.model_fields_set
    return "" if given.isdisjoint(GUIDED) else next(name for name in GUIDED if name in given)


def _of_format(given: ResponseFormat) -> pb.Constraint | None:
    if given.type == "json_schema":
        if given.json_schema is None:
            raise InvalidRequest("response_format.json_schema", MISSING, "a schema, with type json_schema")
        return pb.Constraint(json_schema=_text(given.json_schema.json_schema))
    if given.json_schema is not None:
        raise InvalidRequest(
            "response_format.json_schema", given.json_schema.name, f"none, with type {given.type}"
        )
    return pb.Constraint(json_object=True) if given.type == "json_object" else None


def _of_outputs(given: StructuredOutputs) -> pb.Constraint:
    kinds = {name: getattr(given, name) for name in given.model_fields_set}
    if len(kinds) > 1:
        raise InvalidRequest("structured_outputs", sorted(kinds), KINDS)
    if not kinds:
        return pb.Constraint()
    ((kind, value),) = kinds.items()
    return _of_kind(kind, value)


def _of_kind(kind: str, value: Any) -> pb.Constraint:
    if kind == "json_schema":
        return pb.Constraint(json_schema=_text(value))
    if kind == "choice":
        return pb.Constraint(choice=pb.Choices(texts=value))
    return pb.Constraint(**{kind: value})


def _text(schema: dict[str, Any] | str) -> str:
    if isinstance(schema, str):
        return schema
    try:
        return json_text(schema)
    except ValueError as error:
        raise InvalidRequest("constraint.json_schema", schema, "numbers that JSON has") from error


def json_text(value: dict[str, Any]) -> str:
    """Raises ValueError for a number that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
