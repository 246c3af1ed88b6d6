"""`pdserve logs`: the lines that the processes of a cluster have logged, as they were written."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..telemetry import log_file
from .client import CommandFailed

POLL_S = 0.2
MORE = "    | "  # begins the further lines of an exception, in text


def show_logs(address: str | None, processes: Iterable[str], follow: bool) -> None:
    """Prints the lines of these processes, or all; with `follow` also those to come, until the cluster ends.
    Raises CommandFailed where there is no log, or where none of its lines is theirs."""
    path = log_file.latest() if address is None else log_file.find(address)
    if path is None:
        where = "" if address is None else f" at {address}"
        raise CommandFailed(f"no log of a cluster of yours{where} is on this machine")
    chosen = Chosen(processes)
    for line in followed(path) if follow else read(path):
        if chosen.has(line):
            sys.stdout.write(line)
            sys.stdout.flush()
    if not chosen.num_lines and chosen.wanted:
        known = ", ".join(sorted(chosen.seen)) or "none"
        raise CommandFailed(f"{', '.join(chosen.wanted)} logged nothing; the log has lines of {known}")


class Chosen:
    """Tells which lines are those of the wanted processes: `worker-0` has all incarnations of it."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self.wanted = tuple(wanted)
        self.num_lines = 0
        self.seen: set[str] = set()
        self._has_last = False  # whether the line before was one of them

    def has(self, line: str) -> bool:
        if not line.startswith(MORE):
            name = process_of(line)
            self.seen.add(name.partition("/")[0])
            self._has_last = not self.wanted or name in self.wanted or name.partition("/")[0] in self.wanted
        self.num_lines += self._has_last
        return self._has_last


def process_of(line: str) -> str:
    """Returns the name of the process that has logged a line, in either format."""
    if line.startswith("{"):
        try:
            return str(json.loads(line)["process"])
        except (ValueError, KeyError, TypeError):
            return ""
    words = line.split(maxsplit=3)
    return words[2] if len(words) > 2 else ""


def read(path: Path) -> Iterator[str]:
    """Yields the lines of a log that are there."""
    for part in (log_file.before(path), path):
        with suppress(FileNotFoundError), part.open(errors="replace") as file:
            yield from file


def followed(path: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Yields the lines of a log, also as they are written, until its writer is gone. `pause` waits for
    more."""
    with suppress(FileNotFoundError), log_file.before(path).open(errors="replace") as earlier:
        yield from earlier
    is_written = True
    while is_written:
        with path.open(errors="replace") as file:
            line, is_current = "", True
            while is_current and is_written:
                # in this order: what was written before either changed is read
                is_written, is_current = log_file.is_written(path), _is_at(path, file.fileno())
                while piece := file.readline():
                    line += piece
                    if line.endswith("\n"):
                        yield line
                        line = ""
                if is_current and is_written:
                    pause(POLL_S)


def _is_at(path: Path, file: int) -> bool:
    """Returns whether `path` still is this open file, rather than one that has taken its place."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
