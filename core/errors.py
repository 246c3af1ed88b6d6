"""Environment and user errors. Each states the fault, its place, and the expected value; gateways translate
them once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

DETAILS_KEY = "grpc-status-details-bin"  # the gRPC trailer with the details of an error
MAX_EXPECTED_CHARS = 400  # longer than any of ours
MAX_SHOWN_CHARS = 80  # shown part of a refused value
MAX_TOLD_CHARS = 1400  # of several wrong fields


class PdserveError(Exception):
    """Base of every error that is not a bug of ours."""


class Missing:
    """The value of a field that is not there."""


MISSING = Missing()


class Problem(NamedTuple):
    """One field that is wrong. Texts of bounded length, without terminal control sequences, even where
    `expected` repeats the client's input, as a chat template may."""

    field: str
    shown: str  # the value, as Python writes it; "" for one that is missing
    expected: str

    def __str__(self) -> str:
        if not self.shown:
            return f"{self.field}: missing, expected {self.expected}"
        return f"{self.field}: {self.shown} is not valid, expected {self.expected}"


class InvalidRequest(PdserveError):
    """A client's request cannot be served as it stands. The text fits into headers."""

    def __init__(self, field: str, value: object, expected: str, reason: str = "") -> None:
        """`reason` is a name for programs that tells more than that a field is wrong."""
        shown = "" if value is MISSING else _shown(value)
        self._tell((Problem(field, shown, _printable(expected[:MAX_EXPECTED_CHARS])),), reason)

    @classmethod
    def of(cls, problems: Sequence[Problem], reason: str = "") -> Self:
        """Returns the refusal for these problems, of which there is at least one."""
        error = cls.__new__(cls)
        error._tell(tuple(problems), reason)
        return error

    def _tell(self, problems: tuple[Problem, ...], reason: str) -> None:
        self.problems = problems
        self.reason = reason
        super().__init__("; ".join(map(str, problems)))

    @property
    def field(self) -> str:
        return self.problems[0].field

    @property
    def expected(self) -> str:
        return self.problems[0].expected


CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"


def context_length_exceeded(field: str, value: object, expected: str, max_tokens: int) -> InvalidRequest:
    """Returns the refusal of a request with more tokens than the model takes. Clients recognise it by these
    words."""
    expected += f": the prompt is too long, this model's maximum context length is {max_tokens} tokens"
    return InvalidRequest(field, value, expected, CONTEXT_LENGTH_EXCEEDED)


def refuse(errors: Sequence[InvalidRequest]) -> None:
    """Raises all `errors` as one; returns if there are none."""
    if errors:
        raise joined(errors)


def joined(errors: Sequence[InvalidRequest]) -> InvalidRequest:
    """Returns all of them, at least one, as one: at most one problem of each field, as many as fit a
    header."""
    if len(errors) == 1:
        return errors[0]
    problems: dict[str, Problem] = {}
    num_chars = 0
    for problem in (problem for error in errors for problem in error.problems):
        num_chars += len(str(problem)) * (1 if str(problem).isascii() else 4) + 2
        if problem.field not in problems and (not problems or num_chars <= MAX_TOLD_CHARS):
            problems[problem.field] = problem
    return InvalidRequest.of(tuple(problems.values()), next((e.reason for e in errors if e.reason), ""))


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


class Overloaded(PdserveError):
    """A request would be served too late; retry after `retry_after_s`."""

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(f"{text}, retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """A bounded queue is full."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} requests are queued already", retry_after_s)
        self.limit = limit


class TokensTooSlow(Overloaded):
    """With one more request, every worker would need longer for a token than the objective says."""

    def __init__(self, slo_s: float, retry_after_s: float) -> None:
        super().__init__(
            f"every worker would need more than slo.itl_ms ({1e3 * slo_s:g}) for a token", retry_after_s
        )


class DuplicateRequest(PdserveError):
    """A live request already has this id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id: {request_id!r} is being served already")
        self.request_id = request_id


class KillsWorkers(PdserveError):
    """Workers' processes have died of a request like this one, of the same client, or of several others."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__(
            f"workers died of {what} before, while nothing else was there; it is served again in"
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
