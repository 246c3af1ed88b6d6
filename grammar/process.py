"""Runs the grammar process: starts it when it is needed, starts it again when it died, and never waits for it."""

import asyncio
import logging
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from .messages import FromProcess, Mask, Refused, Setup, ToProcess
from .outputs import Outputs

log = logging.getLogger(__name__)

COSTS = (-signal.SIGPROF, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)  # exit codes: time, stack, memory
SILENT_S = 30.0  # a process without an answer for so long is stopped or starved; its jobs end after half a second of work
READ_BYTES = 1 << 18
START_AGAIN_S = 1.0


class GrammarListener(Protocol):
    """Hears, on the loop, what became of each request: one call each, unless its key was closed."""

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None: ...
    def on_refused(self, key: int, why: str) -> None:
        """The grammar is to blame; the key is closed."""

    def on_failed(self, key: int, why: str) -> None:
        """The grammar is not to blame; the key is closed."""


class GrammarProcess:
    """Used on one asyncio loop. Calls return at once."""

    def __init__(self, set_up: Callable[[], Setup], listener: GrammarListener) -> None:
        """`set_up` is called when a process starts, and may take a moment."""
        self._set_up = set_up
        self._listener = listener
        self._outputs = Outputs()
        self._needed = asyncio.Event()
        self._process: Process | None = None
        self._encoder = FrameEncoder()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pid(self) -> int | None:
        """Of the process, when there is one."""
        return None if self._process is None else self._process.pid

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...] = (), *, probe: bool = False) -> None:
        """Ask for the mask of the next token of an output; see `messages.Open`. A key is never used again."""
        self._send(self._outputs.open(key, grammar, token_ids, probe))

    def advance(self, key: int, token_id: int) -> None:
        """The output has one more token, which its last mask allowed; ask for the next mask."""
        self._send(self._outputs.advance(key, token_id))

    def close(self, key: int) -> None:
        """Forget an output; nothing more is told of it."""
        self._send(self._outputs.close(key))

    async def stop(self) -> None:
        """End the process; idempotent."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _send(self, message: ToProcess | None) -> None:
        if self._outputs.is_asked:
            self._needed.set()
        if message is not None and self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(self._encoder.encode(message))

    async def _run(self) -> None:
        while True:
            await self._needed.wait()
            code = await self._live()
            self._needed.clear()
            victim = self._outputs.died(code in COSTS)
            if victim is not None:
                key, is_to_blame = victim
                if is_to_blame:
                    self._listener.on_refused(key, "it takes too much time or memory")
                else:
                    self._listener.on_failed(key, "the grammar process died over it")
            if self._outputs.is_asked:
                self._needed.set()

    async def _live(self) -> int:
        """One process from start to end; its exit code."""
        arguments = ("-P", "-m", f"{__package__}.main")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
        except OSError:
            log.exception("the grammar process cannot be started")
            await asyncio.sleep(START_AGAIN_S)
            return 1
        try:
            assert process.stdin is not None
            self._process, self._encoder = process, FrameEncoder()
            process.stdin.write(self._encoder.encode(self._set_up()))
            for message in self._outputs.restarted():
                self._send(message)
            await self._read(process)
        except (FrameError, TimeoutError) as error:
            log.warning("the grammar process is killed", extra={"reason": str(error) or "it is silent"})
            _kill(process)
        except asyncio.CancelledError:
            _kill(process)
            await process.wait()
            raise
        finally:
            self._process = None
        code = await process.wait()
        log.warning("the grammar process ended", extra={"exit_code": code})
        return code

    async def _read(self, process: Process) -> None:
        """Until the process ends. Raises FrameError or TimeoutError when it is not to be trusted any more."""
        assert process.stdout is not None
        decoder: FrameDecoder[FromProcess] = FrameDecoder(FromProcess)
        reading = asyncio.ensure_future(process.stdout.read(READ_BYTES))
        try:
            while True:
                done, _ = await asyncio.wait((reading,), timeout=SILENT_S)
                if not done:
                    if self._outputs.is_asked:
                        raise TimeoutError
                    continue
                if not (data := reading.result()):
                    return
                for answer in decoder.feed(data):
                    self._tell(answer)
                reading = asyncio.ensure_future(process.stdout.read(READ_BYTES))
        finally:
            reading.cancel()

    def _tell(self, answer: FromProcess) -> None:
        if not self._outputs.answered(answer):
            return
        match answer:
            case Mask():
                self._listener.on_mask(answer.key, answer.num_tokens, answer.bits)
            case Refused():
                self._listener.on_refused(answer.key, answer.why)


def _kill(process: Process) -> None:
    """Not for one that ends by itself: who asks subprocess to kill it takes its exit code away from asyncio."""
    with suppress(ProcessLookupError):
        process.kill()
