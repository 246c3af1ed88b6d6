"""Maps errors to gRPC statuses: the code, one line for people, and google.rpc details for programs.

No other module decides this; docs/protocol.md has the table.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from ..core.config import ClusterConfig
from ..core.errors import (
    DETAILS_KEY,
    CapacityError,
    ConfigError,
    DuplicateRequest,
    InvalidRequest,
    KillsWorkers,
    NoWorkerAvailable,
    PdserveError,
    QueueFull,
    TokensTooSlow,
)
from ..core.held_bytes import TooLarge, TooManyBytes
from ..core.peer_log import failure_log
from ..core.request import FinishReason
from .auth.access import NotPermitted, RateLimited, Unauthenticated
from .call_bounds import TooSlow
from .places import NoPlace

DOMAIN = "pdserve"
MAX_MESSAGE_CHARS = 1500  # message and details travel as HTTP/2 headers, which peers limit to 8 KiB
RETRY_UNAVAILABLE_S = 1.0  # roughly the least time to replace a worker


class UnknownModel(PdserveError):
    """A client requested a model other than the one served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"model: {asked!r} is not served here, expected {served!r}")
        self.asked = asked
        self.served = served


class UnknownRequest(PdserveError):
    """No request of this id is known."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id: {request_id!r} is not being served, and not among those that ended last"
        )


class NeedsRestart(PdserveError):
    """A configuration differs in keys that a running cluster cannot adopt."""

    def __init__(self, old: ClusterConfig, new: ClusterConfig) -> None:
        self.keys = old.changes_needing_restart(new)
        super().__init__(f"{', '.join(self.keys)}: cannot change while the cluster runs; nothing was changed")


class RequestFailed(PdserveError):
    """A request ended before its choices did."""

    def __init__(self, reason: FinishReason, message: str | None) -> None:
        super().__init__(message or _ENDINGS[reason][1])
        self.reason = reason


class ClientStalled(PdserveError):
    """A client does not read its stream."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the stream was not read for {after_s:g} s")


class ClientGone(Exception):
    """The client has disconnected; there is nobody to answer."""


_ENDINGS = {
    FinishReason.CANCELLED: (grpc.StatusCode.CANCELLED, "the request was cancelled"),
    FinishReason.DEADLINE: (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the deadline passed before the request was done",
    ),
    FinishReason.ERROR: (grpc.StatusCode.UNAVAILABLE, "no worker could finish the request"),
    FinishReason.FATAL: (grpc.StatusCode.INTERNAL, "workers died of the request"),
    FinishReason.INVALID: (grpc.StatusCode.INVALID_ARGUMENT, "the request cannot be carried out"),
}


def to_status(error: PdserveError) -> tuple[grpc.StatusCode, list[Message]]:
    """Returns the code and the details of an error."""
    match error:
        case InvalidRequest():
            problems = [(problem.field, f"expected {problem.expected}") for problem in error.problems]
            reason = [_info(error.reason)] if error.reason else []
            return grpc.StatusCode.INVALID_ARGUMENT, [_bad_request(problems), *reason]
        case ConfigError():
            problems = [("config_yaml", line) for line in _shortened(str(error)).splitlines()]
            return grpc.StatusCode.INVALID_ARGUMENT, [_bad_request(problems)]
        case UnknownModel():
            return grpc.StatusCode.NOT_FOUND, [_info("UNKNOWN_MODEL", served=error.served)]
        case UnknownRequest():
            return grpc.StatusCode.NOT_FOUND, [_info("UNKNOWN_REQUEST")]
        case DuplicateRequest():
            return grpc.StatusCode.ALREADY_EXISTS, [_info("DUPLICATE_REQUEST", request_id=error.request_id)]
        case QueueFull():
            details = [_retry(error.retry_after_s), _info("QUEUE_FULL", max_queued_requests=str(error.limit))]
            return grpc.StatusCode.RESOURCE_EXHAUSTED, details
        case TokensTooSlow():
            details = [_retry(error.retry_after_s), _info("TOKENS_TOO_SLOW")]
            return grpc.StatusCode.RESOURCE_EXHAUSTED, details
        case RateLimited():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, [
                _retry(error.retry_after_s),
                _info("RATE_LIMITED", limit=error.limit),
            ]
        case Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED, [_info("UNAUTHENTICATED")]
        case NotPermitted():
            return grpc.StatusCode.PERMISSION_DENIED, [_info("NOT_PERMITTED")]
        case KillsWorkers():
            return grpc.StatusCode.INTERNAL, [_info("REQUEST_FATAL")]
        case NoWorkerAvailable():
            return grpc.StatusCode.UNAVAILABLE, [_retry(RETRY_UNAVAILABLE_S), _info("NO_WORKER_AVAILABLE")]
        case NeedsRestart():
            return grpc.StatusCode.FAILED_PRECONDITION, [
                _precondition("NEEDS_RESTART", error.keys),
                _info("NEEDS_RESTART"),
            ]
        case CapacityError():
            return grpc.StatusCode.FAILED_PRECONDITION, [_info("CAPACITY")]
        case ClientStalled():
            return grpc.StatusCode.ABORTED, [_info("CLIENT_STALLED")]
        case NoPlace():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, [_retry(error.retry_after_s), _info("TOO_MANY_CALLS")]
        case TooManyBytes():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, [_retry(error.retry_after_s), _info("TOO_MANY_BYTES")]
        case TooLarge():
            return grpc.StatusCode.FAILED_PRECONDITION, [_info("TOO_LARGE")]
        case TooSlow():
            return grpc.StatusCode.ABORTED, [_info("MESSAGE_TOO_SLOW")]
        case RequestFailed():
            retry = [_retry(RETRY_UNAVAILABLE_S)] if error.reason is FinishReason.ERROR else []
            return _ENDINGS[error.reason][0], [*retry, _info(f"REQUEST_{error.reason.name}")]
    return grpc.StatusCode.INTERNAL, [_info(type(error).__name__)]


@asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Wraps a handler's body: ends the call with the status of the error that it raises."""
    try:
        yield
    except PdserveError as error:
        code, details = to_status(error)
        message = _shortened(str(error))
    except ClientGone:  # no status either: a write may still be pending
        raise asyncio.CancelledError from None
    except grpc.aio.AbortError:
        raise
    except NotImplementedError:  # a method that the service's library declares and does not have
        code, details = grpc.StatusCode.UNIMPLEMENTED, list[Message]()
        message = "this server does not have the method"
    except Exception:  # a bug of ours: its details are for the log, not for the client
        failure_log.exception("a call failed")
        code, details, message = (
            grpc.StatusCode.INTERNAL,
            [_info("INTERNAL")],
            "internal error, see the server's log",
        )
    else:
        return
    packed = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed.details.add().Pack(detail)
    try:
        await context.abort(code, message, ((DETAILS_KEY, packed.SerializeToString()),))
    except (grpc.aio.UsageError, grpc.aio.InternalError):
        # the call is already over, or its client is gone or not reading; also without a status: gRPC drops
        # the call without a log line
        raise asyncio.CancelledError from None


async def write(context: grpc.aio.ServicerContext[Any, Any], message: object) -> None:
    """Sends a message to a client, however long it takes to have room. Raises ClientGone if the call is
    over."""
    try:
        await context.write(message)
    except grpc.aio.InternalError:  # a write that was waiting when its call was cancelled
        raise ClientGone from None


async def write_within(
    context: grpc.aio.ServicerContext[Any, Any], message: object, max_unread_s: float
) -> None:
    """Sends a message as `write` does. Raises ClientStalled if the client has no room for it in time."""
    try:
        async with asyncio.timeout(max_unread_s):
            await write(context, message)
    except TimeoutError:
        raise ClientStalled(max_unread_s) from None


def _shortened(text: str) -> str:
    """Shortens a message for a header, where a character beyond ASCII takes up to 12 bytes instead of 3."""
    max_chars = MAX_MESSAGE_CHARS if text.isascii() else MAX_MESSAGE_CHARS // 4
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def _bad_request(problems: list[tuple[str, str]]) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation
    violations = [violation(field=field, description=description) for field, description in problems]
    detail: Message = error_details_pb2.BadRequest(field_violations=violations)
    return detail


def _precondition(kind: str, subjects: list[str]) -> Message:
    violation = error_details_pb2.PreconditionFailure.Violation
    violations = [violation(type=kind, subject=subject) for subject in subjects]
    detail: Message = error_details_pb2.PreconditionFailure(violations=violations)
    return detail


def _retry(delay_s: float) -> Message:
    delay = Duration()
    delay.FromNanoseconds(int(delay_s * 1e9))
    detail: Message = error_details_pb2.RetryInfo(retry_delay=delay)
    return detail


def _info(reason: str, **metadata: str) -> Message:
    detail: Message = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    return detail
