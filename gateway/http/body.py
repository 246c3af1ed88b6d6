"""Reads the body of a request. Its size is limited before (`gate`), its depth by the parser: 200 levels."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from .errors import Refused, malformed

Model = TypeVar("Model", bound=BaseModel)


async def read(http: Request, model: type[Model]) -> Model:
    """The body as `model` describes it. Raises InvalidRequest or Refused."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):  # what a web page may send without being asked is not JSON
        raise Refused(415, "unsupported_media_type", f"content-type: {kind!r} is not valid, expected application/json")
    try:
        return model.model_validate_json(await http.body())
    except ValidationError as error:
        raise malformed(error) from error
