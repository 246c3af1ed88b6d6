"""Constraints on the output: translates OpenAI's `response_format` or vLLM's `structured_outputs` to the
message of the gRPC API."""

import json
from typing import Any

from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb
from ..constraint import KINDS
from .schema import GenerationBody, ResponseFormat, StructuredOutputs


def constraint_message(body: GenerationBody) -> pb.Constraint | None:
    """Returns None if the output is unconstrained. Raises InvalidRequest."""
    given = None if body.response_format is None else _of_format(body.response_format)
    if body.structured_outputs is None:
        return given
    if given is not None:
        raise InvalidRequest("structured_outputs", "", "nothing beside a response_format of JSON")
    return _of_outputs(body.structured_outputs)


def _of_format(given: ResponseFormat) -> pb.Constraint | None:
    if given.type == "json_schema":
        if given.json_schema is None:
            raise InvalidRequest("response_format.json_schema", "", "a schema, with type json_schema")
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
    if "json_schema" in kinds:
        return pb.Constraint(json_schema=_text(kinds["json_schema"]))
    if "choice" in kinds:
        return pb.Constraint(choice=pb.Choices(texts=kinds["choice"]))
    return pb.Constraint(**kinds)


def _text(schema: dict[str, Any] | str) -> str:
    if isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise InvalidRequest("constraint.json_schema", schema, "numbers that JSON has") from error
