"""Sections in processes of their own: one that takes too long is ended, one whose check took the GPU from it
goes on in a new process, and what all of them wrote is kept."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

from .report import Begun, Broken, Check, Message, NotRun, received
from .sections import GPU_LOST, Section

REPOSITORY = Path(__file__).resolve().parents[2]  # where the package `bench` lies
_LINES_OF_AN_ERROR = 12
_SHARE_OF_A_CHECK = 0.5  # share of its section's time: a check that takes more hangs


@dataclass(frozen=True)
class Program:
    """The command that starts the processes of sections."""

    path: Path
    arguments: Sequence[str] = ()
    interpret: bool = False
    limits: dict[str, float] = field(default_factory=dict)

    def command(self, section: Section, left_s: float, first_check: int) -> list[str]:
        command = [
            sys.executable,
            str(self.path),
            "--section",
            section.name,
            "--limits",
            json.dumps(self.limits),
        ]
        command += ["--budget-s", f"{left_s:.1f}", "--first-check", str(first_check)]
        return [*command, *(["--interpret"] if self.interpret else []), *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if self.interpret else {})


def run_side_by_side(sections: Sequence[Section], program: Program, stderr_folder: Path) -> Iterator[Message]:
    """The messages of all of them, as they come."""
    messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def run(section: Section) -> None:
        try:
            for message in run_apart(section, program, stderr_folder):
                messages.put(message)
        finally:
            messages.put(None)

    for section in sections:
        threading.Thread(target=run, args=(section,), daemon=True).start()
    num_left = len(sections)
    while num_left:
        message = messages.get()
        if message is None:
            num_left -= 1
        else:
            yield message


def run_apart(section: Section, program: Program, stderr_folder: Path) -> Iterator[Message]:
    """The messages of one section, as they come; the last is a Broken one if it did not end well.

    A check that ends its process, or after which nothing runs on its GPU, has failed; the section goes on
    behind it. Standard error is written to `stderr_folder`, where it stays."""
    ends_s = time.monotonic() + section.budget_s
    first_check = 0
    path = stderr_folder / f"{section.name}.txt"
    with path.open("w+") as errors:
        while True:
            process = _Process(
                program.command(section, ends_s - time.monotonic(), first_check), program, errors.fileno()
            )
            yield from process.messages(section, ends_s)
            if process.has_ended_badly:
                errors.seek(0)
                print(
                    *errors.read().splitlines()[-_LINES_OF_AN_ERROR:], sep="\n", file=sys.stderr, flush=True
                )
            if not process.may_go_on or time.monotonic() >= ends_s:
                return
            first_check += process.num_begun


class _Process:
    """One process of a section. `may_go_on` once it has ended: a check ended it, and what is behind that can
    still be done."""

    def __init__(self, command: list[str], program: Program, errors: int) -> None:
        self.num_begun = 0
        self.may_go_on = False
        self.has_ended_badly = False
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes when we end, which ends it
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=program.environment,
            process_group=0,
        )

    def messages(self, section: Section, ends_s: float) -> Generator[Message, None, None]:
        process, check, is_broken = self._process, None, False
        assert process.stdout is not None
        assert process.stdin is not None
        watch = _Watch(process, ends_s)
        try:
            for line in process.stdout:
                if not line.endswith("\n"):  # the last line of a killed process may be cut
                    continue
                message = received(line)
                if isinstance(message, Begun):
                    check = message
                    self.num_begun += 1
                    watch.limit(section.budget_s * _SHARE_OF_A_CHECK)
                    continue
                if isinstance(message, Check | NotRun):
                    check = None
                    watch.limit(None)
                is_broken = is_broken or isinstance(message, Broken)
                yield message
            status = process.wait()
        finally:
            watch.end()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
            process.stdin.close()
        self.has_ended_badly = status != 0
        if watch.ended_at == ends_s:
            yield Broken(section.name, f"not done after {section.budget_s:g} s")
        elif check is not None and not is_broken:
            ended = f"its process ended with status {status}"
            problem = (
                ended
                if watch.ended_at is None
                else f"not done after {section.budget_s * _SHARE_OF_A_CHECK:g} s"
            )
            yield Check(check.name, nan, 0.0, problem)
            self.may_go_on = True
        elif status == GPU_LOST and self.num_begun:
            self.may_go_on = True
        elif status and not is_broken:
            yield Broken(section.name, f"its process ended with status {status}")


class _Watch:
    """Ends a process when the time of its section, or of its current work, is over."""

    def __init__(self, process: "subprocess.Popen[str]", ends_s: float) -> None:
        self.ended_at: float | None = None  # the time that was over
        self._process = process
        self._ends_s = ends_s
        self._timer: threading.Timer | None = None
        self.limit(None)

    def limit(self, most_s: float | None) -> None:
        """Restarts its time limit, bounded by the end of its section's time."""
        self.end()
        now_s = time.monotonic()
        ends_s = self._ends_s if most_s is None else min(now_s + most_s, self._ends_s)
        self._timer = threading.Timer(max(ends_s - now_s, 0.0), self._kill, (ends_s,))
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self, ends_s: float) -> None:
        self.ended_at = ends_s
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
