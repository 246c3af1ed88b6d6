"""Environment and user errors. Each states the fault, its place, and the expected value; gateways translate
them once."""

from collections.abc import Iterator
from typing import Self

MAX_EXPECTED_CHARS = 400  # longer than any of ours
MAX_SHOWN_CHARS = 80  # shown part of a refused value


class PdserveError(Exception):
    """Base of every error that is not a bug of ours."""


class InvalidRequest(PdserveError):
    """A client's request cannot be served as it stands. Its text fits into headers and contains no terminal
    control sequences, even where `expected` repeats the client's input, as a chat template may."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        expected = _printable(expected[:MAX_EXPECTED_CHARS])
        super().__init__(f"{field}: {_shown(value)} is not valid, expected {expected}")
        self.field = field
        self.expected = expected

    @classmethod
    def restored(cls, message: str, field: str, expected: str) -> Self:
        """Rebuilds the same refusal in another process."""
        error = cls.__new__(cls)
        Exception.__init__(error, message)
        error.field, error.expected = field, expected
        return error


def _shown(value: object) -> str:
    """The beginning of `repr(value)`, at a cost that does not grow with the value."""
    shown = ""
    for piece in _pieces(value):
        shown += piece
        if len(shown) > MAX_SHOWN_CHARS:
            return shown[: MAX_SHOWN_CHARS - 3] + "..."
    return shown


def _pieces(value: object) -> Iterator[str]:
    """The beginning of `repr(value)`. No deeper than MAX_SHOWN_CHARS, as each level has a bracket."""
    if isinstance(value, str):
        yield repr(value[: MAX_SHOWN_CHARS + 1])
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield f"{', ' if index else ''}{_shown(key)}: "
            yield from _pieces(item)
        yield "}"
    else:
        yield repr(value)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ConfigError(PdserveError):
    """A configuration file or option is wrong."""


class CheckpointError(PdserveError):
    """A model checkpoint is missing, corrupt, or of a kind that is not supported."""


class CapacityError(PdserveError):
    """The machine or cluster has too few devices or too little memory for the configuration."""


class QueueFull(PdserveError):
    """A bounded queue is full; retry after `retry_after_s`."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} requests are queued already, retry in {retry_after_s:.1f} s")
        self.limit = limit
        self.retry_after_s = retry_after_s


class DuplicateRequest(PdserveError):
    """A live request already has this id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id: {request_id!r} is being served already")
        self.request_id = request_id


class KillsWorkers(PdserveError):
    """Workers' processes have died of a request like this one, of the same client."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(
            "workers died of this request before, one of them while it was there alone; it is served again in"
            f" {retry_after_s:.0f} s at the earliest"
        )


class NoWorkerAvailable(PdserveError):
    """No worker can serve the request."""


class InvalidTransition(AssertionError):
    """A state machine was asked for a transition its table does not have: a bug of ours. Carries the object's
    history."""

    def __init__(self, what: str, state: object, target: object, history: object) -> None:
        super().__init__(f"{what}: {state} -> {target} is not a transition; history: {history}")


class UnexpectedEvent(AssertionError):
    """A state machine was given an event that cannot occur in its state: a bug of ours. Carries the object's
    history."""

    def __init__(self, what: str, state: object, event: object, history: object) -> None:
        super().__init__(f"{what}: {event} cannot come in {state}; history: {history}")
