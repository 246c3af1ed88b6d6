"""The parts of a run, and the process of one. An error on the GPU spoils whatever else its process does
there, so each part has a process of its own (`apart.py` starts it and reads what it sends)."""

import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TextIO

from .report import Begun, Broken, Limit, Message, send

GPU_LOST = 3  # exit status of a process that can do no more on the GPU, after a check that says why


class GpuLostError(Exception):
    """This process can do no more on the GPU; another one can."""


@dataclass(frozen=True)
class Context:
    """A section's inputs."""

    emit: Callable[[Message | Begun], None]
    interpret: bool = False  # toy sizes, on the processor, in Triton's interpreter
    limits: dict[str, float] = field(default_factory=dict)  # per second, by name
    ends_s: float = float("inf")  # on `time.monotonic`
    has_peers: bool = True  # others are measured beside ours
    first_check: int = 0  # those before it are done
    only_check: str = ""  # part of a check's name; "": all

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
    is_on_request: bool = False  # left out where no section is named
    has_toy_sizes: bool = False  # runs in the interpreter too

    def call(self, context: Context) -> None:
        module, name = self.function.split(".")
        getattr(importlib.import_module(f".{module}", __package__), name)(context)


SECTIONS = (
    Section("limits", "limits.measure", 40),
    Section("kernels", "kernel_checks.check", 90, is_correctness=True, has_toy_sizes=True),
    Section("engine", "engine_checks.check", 70, is_correctness=True, has_toy_sizes=True),
    Section("attention", "attention.measure", 100),
    Section("transfer", "transfer.measure", 70),
    Section("llama-8b", "serving.measure_8b", 100),
    Section("llama-1b", "serving.measure_1b", 60),
    Section("qwen3-0.6b", "throughput.measure", 100),
    Section("sweep", "sweep.measure", 100, is_on_request=True, has_toy_sizes=True),
    Section("profile", "step_profile.measure", 90, is_on_request=True, has_toy_sizes=True),
)
BY_NAME = {section.name: section for section in SECTIONS}
CORRECTNESS = tuple(section.name for section in SECTIONS if section.is_correctness)


def run_here(section: Section, context: Context) -> None:
    """Reports an error under its own name."""
    try:
        section.call(context)
    except GpuLostError:
        raise
    except Exception as error:  # whatever went wrong in this part, the others go on
        traceback.print_exc()
        context.emit(Broken(section.name, f"{type(error).__name__}: {error}"))


def serve(section: Section, context: Callable[[Callable[[Message | Begun], None]], Context]) -> NoReturn:
    """The process of a section: messages on standard output, all else on standard error; `context` is made
    with what emits.

    Its status is 1 if the section broke, GPU_LOST if it is to go on in another process.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = _claim_stdout()
    broken: list[Message] = []

    def emit(message: Message | Begun) -> None:
        if isinstance(message, Broken):
            broken.append(message)
        send(message, out)

    try:
        run_here(section, context(emit))
        status = 1 if broken else 0
    except GpuLostError:
        status = GPU_LOST
    sys.stderr.flush()
    os._exit(status)  # at once, whatever threads a peer may have left


def limits_of(messages: list[Message]) -> dict[str, float]:
    return {message.name: message.per_s for message in messages if isinstance(message, Limit)}


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it ends."""
    sys.stdin.buffer.read()
    os._exit(1)


def _claim_stdout() -> TextIO:
    """A handle on standard output for messages alone; what libraries print goes to standard error from now
    on."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out
