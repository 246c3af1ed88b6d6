"""The benchmark's end of a peer: a process kept alive with its model loaded, asked for one case after
another.

All peers can be alive at once, so that a runner can take turns between them and a busy machine is busy for
everyone. A peer is stopped (SIGSTOP) while it is not its turn: some keep polling when they have nothing to
do."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .schema import Case, CellResult

_FOLDER = Path(__file__).parent.parent
_EXIT_TIMEOUT_S = 30.0


class PeerError(RuntimeError):
    """A peer's process ended without an answer; its standard error says why."""


@dataclass(frozen=True)
class PeerSpec:
    """A peer's program, the interpreter whose environment it needs, and arguments of its own."""

    module: str
    python: str = sys.executable
    arguments: tuple[str, ...] = ()


TRANSFORMERS = PeerSpec("peers.transformers_peer")


def vllm(python: str) -> PeerSpec:
    return PeerSpec("peers.vllm_peer", python)


class Peer:
    """A context manager; leaving it ends the process."""

    def __init__(
        self, spec: PeerSpec, checkpoint: Path, shape: str, dtype: str, num_threads: int, num_repeats: int = 3
    ) -> None:
        self._name = f"{spec.module} ({shape}, {dtype})"
        options = ["--checkpoint", str(checkpoint.resolve()), "--shape", shape, "--dtype", dtype]
        counts = ["--threads", str(num_threads), "--repeats", str(num_repeats)]
        # Started in the folder of the package `peers`, not in the repository's: there the rooms' names would
        # hide installed packages.
        self._process = subprocess.Popen(
            [spec.python, "-m", spec.module, *options, *counts, *spec.arguments],
            cwd=_FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer("the start")
        self._process.send_signal(signal.SIGSTOP)

    def measure(self, case: Case) -> Sequence[CellResult]:
        """One result per variant of the engine."""
        process = self._process
        assert process.stdin is not None
        process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has ended; the missing answer says so
            print(json.dumps(asdict(case)), file=process.stdin, flush=True)
        results = [CellResult.from_json(value) for value in self._answer(f"case {case.name}")]
        process.send_signal(signal.SIGSTOP)
        return results

    def _answer(self, to: str) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended with status {self._process.wait()} at {to}")
        answer: list[dict[str, Any]] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of its input ends a peer; one that is in the middle of a case is killed."""
        self._process.send_signal(signal.SIGCONT)
        try:
            if kind is None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.communicate(timeout=_EXIT_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.communicate()
