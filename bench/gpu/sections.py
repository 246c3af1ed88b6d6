"""The parts of a run. Each has a process of its own: an error on the GPU spoils whatever else its process does there, and a
part that takes too long can be ended. What it says on the way is kept."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

from .report import Broken, Limit, Message, received, send

_LINES_OF_AN_ERROR = 12


@dataclass(frozen=True)
class Context:
    """What a section is given."""

    emit: Callable[[Message], None]
    interpret: bool = False  # toy sizes, on the processor, in Triton's interpreter
    limits: dict[str, float] = field(default_factory=dict)  # per second, by name
    ends_s: float = float("inf")  # on `time.monotonic`

    @property
    def device(self) -> str:
        return "cpu" if self.interpret else "cuda"

    @property
    def left_s(self) -> float:
        return self.ends_s - time.monotonic()

    def share(self, limit: str, per_s: float) -> float:
        """NaN where the limit is not known."""
        return per_s / self.limits.get(limit, float("nan"))


@dataclass(frozen=True)
class Section:
    """`function`, "module.name" in this folder, is called with a Context. After `budget_s` it is ended."""

    name: str
    function: str
    budget_s: float
    is_correctness: bool = False

    def call(self, context: Context) -> None:
        module, name = self.function.split(".")
        getattr(importlib.import_module(f".{module}", __package__), name)(context)


SECTIONS = (
    Section("limits", "limits.measure", 40),
    Section("kernels", "kernel_checks.check", 180, is_correctness=True),
    Section("engine", "engine_checks.check", 90, is_correctness=True),
    Section("attention", "attention.measure", 100),
    Section("llama-8b", "serving.measure_8b", 100),
    Section("llama-1b", "serving.measure_1b", 60),
    Section("qwen3-0.6b", "throughput.measure", 100),
    Section("transfer", "transfer.measure", 70),
)
CORRECTNESS = tuple(section.name for section in SECTIONS if section.is_correctness)


def run_here(section: Section, context: Context) -> None:
    """An error is told as what it is."""
    try:
        section.call(context)
    except Exception as error:  # whatever went wrong in this part, the others go on
        traceback.print_exc()
        context.emit(Broken(section.name, f"{type(error).__name__}: {error}"))


def run_apart(section: Section, program: Path, *, interpret: bool, limits: dict[str, float]) -> Iterator[Message]:
    """Its messages as they come; the last is a Broken one if it did not end well."""
    command = [sys.executable, str(program), "--section", section.name, "--limits", json.dumps(limits)]
    command += ["--budget-s", f"{section.budget_s:.1f}", *(["--interpret"] if interpret else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {}
    timed_out, is_broken = threading.Event(), False
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, process_group=0)
        assert process.stdout is not None

        def end() -> None:
            timed_out.set()
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(section.budget_s, end)
        timer.start()
        try:
            for line in process.stdout:
                if line.endswith("\n"):  # of one that was ended, the last may be cut
                    message = received(line)
                    is_broken = is_broken or isinstance(message, Broken)
                    yield message
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        if timed_out.is_set():
            yield Broken(section.name, f"not done after {section.budget_s:g} s")
        elif status and not is_broken:
            yield Broken(section.name, f"its process ended with status {status}")
        if timed_out.is_set() or status:
            errors.seek(0)
            print(*errors.read().splitlines()[-_LINES_OF_AN_ERROR:], sep="\n", file=sys.stderr, flush=True)


def serve(section: Section, *, interpret: bool, limits: dict[str, float]) -> NoReturn:
    """The process of a section: messages on standard output, all else on standard error. Its status is 1 if it broke."""
    out = _claim_stdout()
    broken: list[Message] = []

    def emit(message: Message) -> None:
        if isinstance(message, Broken):
            broken.append(message)
        send(message, out)

    run_here(section, Context(emit, interpret, limits, time.monotonic() + section.budget_s))
    sys.stderr.flush()
    os._exit(1 if broken else 0)  # at once, whatever threads a peer may have left


def limits_of(messages: list[Message]) -> dict[str, float]:
    return {message.name: message.per_s for message in messages if isinstance(message, Limit)}


def _claim_stdout() -> TextIO:
    """A handle on standard output for messages alone; what libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out
