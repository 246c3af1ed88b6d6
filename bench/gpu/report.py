"""The entries that a section reports, their format between its process and the parent, and the table that is
printed last."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class Check:
    """One comparison with a reference. `error` is NaN where there was none to compute."""

    name: str
    error: float
    tolerance: float
    problem: str = ""  # the error raised instead

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.tolerance  # NaN is not


@dataclass(frozen=True)
class Begun:
    """A check is under way: should its process end before it does, this is the one that ended it. Readers
    never see it."""

    name: str


@dataclass(frozen=True)
class NotRun:
    """A check that this machine's software cannot carry out, whatever the kernel is like."""

    name: str
    reason: str


@dataclass(frozen=True)
class Limit:
    """A peak rate of this GPU, measured in this run."""

    name: str
    per_s: float  # bytes or operations
    text: str


@dataclass(frozen=True)
class Row:
    """One line of the table. `share` is of the limit that bounds it, or the ratio that is asked for."""

    what: str
    measured: str
    share: str = ""
    target: str = ""  # in words; "": nothing is asked for
    ok: bool | None = None


@dataclass(frozen=True)
class Broken:
    """A section did not come to its end."""

    section: str
    problem: str


@dataclass(frozen=True)
class Note:
    """Information for the table's reader: versions, parts that could not be run."""

    text: str


Message = Check | NotRun | Limit | Row | Broken | Note
_WHAT = 76  # columns
_Sent = Message | Begun
_KINDS: dict[str, type[_Sent]] = {
    kind.__name__: kind for kind in (Check, NotRun, Limit, Row, Broken, Note, Begun)
}


def at_least(what: str, measured: str, share: float, least: float, of: str) -> Row:
    """A row whose share of a limit, named by `of`, has to reach `least`."""
    return Row(what, measured, f"{share:.1%}", f">= {least:.0%} of {of}", share >= least)


def times_at_least(what: str, measured: str, ratio: float, least: float, of: str) -> Row:
    """A row whose ratio to something measured in the same run has to reach `least`."""
    return Row(what, measured, f"{ratio:.2f}x", f">= {least:g} times {of}", ratio >= least)


def send(message: Message | Begun, to: TextIO) -> None:
    print(json.dumps({"kind": type(message).__name__} | asdict(message)), file=to, flush=True)


def received(line: str) -> Message | Begun:
    fields = json.loads(line)
    return _KINDS[fields.pop("kind")](**fields)


def is_correct(messages: Iterable[Message], correctness: Iterable[str]) -> bool:
    """Whether every check passed, and each of the sections named in `correctness` came to its end."""
    needed = set(correctness)
    return all(
        message.ok
        if isinstance(message, Check)
        else not (isinstance(message, Broken) and message.section in needed)
        for message in messages
    )


def line_of(message: Message) -> str:
    """The line that is printed during the run."""
    match message:
        case Check():
            error = message.problem or f"error {message.error:.2g}, at most {message.tolerance:.2g}"
            return f"{'ok    ' if message.ok else 'FAILED'} {message.name}: {error}"
        case NotRun():
            return f"not run {message.name}: {message.reason}"
        case Limit():
            return f"limit: {message.name}: {message.text}"
        case Row():
            return _row(message)
        case Broken():
            return f"BROKEN {message.section}: {message.problem}"
        case Note():
            return f"note: {message.text}"


def summary(messages: list[Message]) -> str:
    """The closing summary, printed when everything has run."""
    checks = [message for message in messages if isinstance(message, Check)]
    lines = [line_of(message) for message in messages if isinstance(message, Note)]
    not_run = [message for message in messages if isinstance(message, NotRun)]
    left_out = (
        f", {len(not_run)} not run: {'; '.join({each.reason: None for each in not_run})}" if not_run else ""
    )
    lines.append(f"correctness: {sum(check.ok for check in checks)} of {len(checks)} checks passed{left_out}")
    lines += [line_of(message) for message in messages if isinstance(message, Check) and not message.ok]
    lines += [line_of(message) for message in messages if isinstance(message, Broken)]
    lines += [line_of(message) for message in messages if isinstance(message, Limit)]
    rows = [message for message in messages if isinstance(message, Row)]
    if rows:
        lines += ["", f"{'':<{_WHAT}} {'measured':>18} {'share':>7}  {'target':<28}", *map(_row, rows)]
    return "\n".join(lines)


def _row(row: Row) -> str:
    verdict = {True: "OK", False: "missed", None: ""}[row.ok]
    return f"{row.what:<{_WHAT}} {row.measured:>18} {row.share:>7}  {row.target:<28} {verdict}".rstrip()
