"""Errors of the world. Each says what was wrong, where, and what was expected; gateways translate them once."""

MAX_EXPECTED_CHARS = 400  # longer than any of ours


class PdserveError(Exception):
    """Base of every error that is not a bug of ours."""


class InvalidRequest(PdserveError):
    """A client's request cannot be served as it stands. What is told fits into headers, and nothing in it acts on a terminal,
    also where `expected` repeats what the client said, as a chat template may."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        expected = _printable(expected[:MAX_EXPECTED_CHARS])
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: {shown} is not valid, expected {expected}")
        self.field = field
        self.expected = expected


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ConfigError(PdserveError):
    """A configuration file or option is wrong."""


class CheckpointError(PdserveError):
    """A model checkpoint is missing, corrupt, or of a kind that is not supported."""


class CapacityError(PdserveError):
    """The machine or cluster has too few devices or too little memory for what was asked."""


class QueueFull(PdserveError):
    """A bounded queue is full; retry after `retry_after_s`."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} requests are queued already, retry in {retry_after_s:.1f} s")
        self.limit = limit
        self.retry_after_s = retry_after_s


class DuplicateRequest(PdserveError):
    """A live request has this id already."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id: {request_id!r} is being served already")
        self.request_id = request_id


class NoWorkerAvailable(PdserveError):
    """No worker can serve the request."""


class InvalidTransition(AssertionError):
    """A state machine was asked for a transition its table does not have: a bug of ours. Carries the object's history."""

    def __init__(self, what: str, state: object, target: object, history: object) -> None:
        super().__init__(f"{what}: {state} -> {target} is not a transition; history: {history}")
