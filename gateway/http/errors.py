"""Errors in OpenAI's format. `translate` maps errors to statuses, for both servers."""

import math
from typing import Any

import grpc
import msgspec
from google.rpc import error_details_pb2
from pydantic_core import ErrorDetails
from starlette.responses import Response

from ...core.errors import MISSING, InvalidRequest, PdserveError
from ...core.peer_log import failure_log
from ..translate import UnknownModel, to_status

STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 408,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
CODES = {"UNKNOWN_MODEL": "model_not_found"}  # where OpenAI has a name for it


class HttpRefusal(PdserveError):
    """Refusals that exist only in HTTP: an unknown path, a body that is too large, too many calls."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.closes = closes  # the connection: the rest of the request was not read


class ErrorBody(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


def error_response(error: Exception) -> Response:
    """Returns the whole response to a request that failed before its response began."""
    status, body, retry_after_s = describe(error)
    headers = {}
    if retry_after_s is not None:
        headers = {
            "retry-after": str(math.ceil(retry_after_s)),
            "retry-after-ms": str(math.ceil(retry_after_s * 1e3)),
        }
    if isinstance(error, HttpRefusal) and error.closes:
        headers["connection"] = "close"
    return Response(error_json(body), status, headers, media_type="application/json")


def error_json(body: ErrorBody) -> bytes:
    return msgspec.json.encode({"error": body})


def describe(error: Exception) -> tuple[int, ErrorBody, float | None]:
    """Returns an error's HTTP status, the text to report, and when to retry."""
    if isinstance(error, HttpRefusal):
        return error.status, ErrorBody(str(error), _type(error.status), None, error.code), error.retry_after_s
    if not isinstance(error, PdserveError):  # a bug of ours: its details are for the log, not for the client
        failure_log.error("a request failed", exc_info=error)
        return 500, ErrorBody("internal error, see the server's log", _type(500), None, "internal"), None
    grpc_code, details = to_status(error)
    status = STATUSES.get(grpc_code, 500)
    body = ErrorBody(str(error), _type(status), None, None)
    if isinstance(error, UnknownModel):
        body.param = "model"
    retry_after_s = None
    for detail in details:
        match detail:
            case error_details_pb2.BadRequest():
                body.param = detail.field_violations[0].field or None
                body.code = "invalid_value"
            case error_details_pb2.ErrorInfo():
                body.code = CODES.get(detail.reason, detail.reason.lower())
            case error_details_pb2.RetryInfo():
                retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
    return status, body, retry_after_s


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def malformed(fault: ErrorDetails) -> InvalidRequest:
    """Returns the refusal of a body that violates its schema in this way."""
    field, kind = _path(fault["loc"]), fault["type"]
    if kind == "json_invalid":
        expected = f"valid JSON ({fault['msg'].removeprefix('Invalid JSON: ')})"
        return InvalidRequest("body", "...", expected)
    if kind == "missing":
        return InvalidRequest(field, MISSING, "a value: the field is required")
    if kind == "extra_forbidden":
        expected = "only fields that this server knows (limits.unknown_fields: ignore accepts others)"
        return InvalidRequest(field, fault["input"], expected)
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("expected ")
    expected = {"True": "true", "False": "false"}.get(expected, expected)  # as JSON writes it
    return InvalidRequest(field or "body", fault["input"], expected)


def _path(loc: tuple[Any, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
