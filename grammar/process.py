"""Runs the grammar process: starts it on demand, restarts it after a death, and never waits for it."""

import asyncio
import logging
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..core.codec import FrameDecoder, FrameEncoder
from .messages import JOB_S, FromProcess, GrammarRefused, GrammarSetup, Mask, ToProcess
from .outputs import Death, Outputs

log = logging.getLogger(__name__)

DEATHS = {  # by exit code; all others are OTHER
    -signal.SIGPROF: Death.TIME,
    -signal.SIGSEGV: Death.RESOURCES,
    -signal.SIGBUS: Death.RESOURCES,
    -signal.SIGABRT: Death.RESOURCES,
}
# a process without an answer for this long is stopped or starved; its jobs end after half a second of work
SILENT_S = 30.0
READ_BYTES = 1 << 18
START_AGAIN_S = 1.0  # after a process that never answered
NICENESS = 10  # a worker's own computing goes first


class GrammarListener(Protocol):
    """Hears, on the loop, what became of each request: one call each, unless its key was closed."""

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None: ...
    def on_refused(self, key: int, why: str) -> None:
        """The grammar is to blame; the key is closed."""

    def on_failed(self, key: int, why: str) -> None:
        """The grammar is not to blame; the key is closed."""


class GrammarProcess:
    """Used on one asyncio loop. Calls return at once."""

    def __init__(
        self,
        set_up: Callable[[], GrammarSetup],
        listener: GrammarListener,
        on_cost: Callable[[str, float], None] = lambda client, cost_s: None,
        niceness: int = NICENESS,
    ) -> None:
        """`set_up` is called once, on a thread, and may take a moment. `on_cost` hears, after the listener,
        for which client a job was and what processor time it took."""
        self._set_up = set_up
        self._on_cost = on_cost
        self._niceness = niceness
        self._first_frame: bytes | None = None  # the same for every process
        self._listener = listener
        self._outputs = Outputs()
        self._needed = asyncio.Event()
        self._process: Process | None = None
        self._encoder = FrameEncoder()
        self._answered_s = 0.0  # when the last answer came, or the first question after it
        self._has_answered = False  # the process of now
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pid(self) -> int | None:
        """The process id, or None when there is no process."""
        return None if self._process is None else self._process.pid

    def open(
        self,
        key: int,
        grammar: str,
        token_ids: tuple[int, ...] = (),
        *,
        probe: bool = False,
        client: str = "",
    ) -> None:
        """Ask for the mask of the next token of an output; see `messages.Open`. A key is never used again."""
        self._note_question()
        self._outputs.open(key, grammar, token_ids, probe=probe, client=client)
        self._ask()

    def advance(self, key: int, token_id: int) -> None:
        """The output has one more token, which its last mask allowed; ask for the next mask."""
        self._note_question()
        self._outputs.advance(key, token_id)
        self._ask()

    def close(self, key: int) -> None:
        """Forgets an output; the listener receives nothing more about it."""
        message = self._outputs.close(key)
        if message is not None:
            self._send(message)

    def hand_over(self, client: str, other: "GrammarProcess") -> list[int]:
        """Moves all outputs of a client to another process. Returns their keys."""
        other._note_question()
        keys, messages = self._outputs.hand_over(client, other._outputs)
        for message in messages:
            self._send(message)
        other._ask()
        return keys

    async def stop(self) -> None:
        """End the process; idempotent."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _note_question(self) -> None:
        if not self._outputs.is_asked:
            self._answered_s = time.monotonic()

    def _ask(self) -> None:
        if self._process is not None:
            for request in self._outputs.requests():
                self._send(request)
        elif self._outputs.is_asked:
            self._needed.set()

    def _send(self, message: ToProcess) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(self._encoder.encode(message))

    async def _run(self) -> None:
        while True:
            await self._needed.wait()
            self._has_answered = False
            death = await self._live()
            self._needed.clear()
            client = self._outputs.oldest_client
            victim = self._outputs.died(death)
            if victim is not None:
                key, is_to_blame = victim
                if is_to_blame:
                    self._listener.on_refused(key, "it takes too much time or memory")
                else:
                    self._listener.on_failed(key, "the grammar process died over it")
            if client is not None and death is not Death.OTHER:
                self._on_cost(client, JOB_S)
            if not self._has_answered and death is Death.OTHER:
                for key in self._outputs.give_up():
                    self._listener.on_failed(key, "the grammar process does not start")
                await asyncio.sleep(START_AGAIN_S)
            if self._outputs.is_asked:
                self._needed.set()

    async def _live(self) -> Death:
        """One process from start to end."""
        try:
            if self._first_frame is None:
                self._first_frame = FrameEncoder().encode(await asyncio.to_thread(self._set_up))
            arguments = ("-P", "-m", f"{__package__}.main", str(self._niceness))
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
        except Exception:  # any error here has to reach those who wait
            log.exception("the grammar process cannot be started")
            return Death.OTHER
        try:
            self._begin(process, self._first_frame)
            await self._read(process)
        except asyncio.CancelledError:
            _kill(process)
            await process.wait()
            raise
        except Exception:  # it is silent, or talks nonsense, or we do: it is not to be trusted any more
            log.exception("the grammar process is killed")
            _kill(process)
        finally:
            self._process = None
        code = await process.wait()
        log.warning("the grammar process ended", extra={"exit_code": code})
        return DEATHS.get(code, Death.OTHER)

    def _begin(self, process: Process, first_frame: bytes) -> None:
        assert process.stdin is not None
        self._process, self._encoder = process, FrameEncoder(first_number=1)
        self._answered_s = time.monotonic()
        process.stdin.write(first_frame)
        self._ask()

    async def _read(self, process: Process) -> None:
        """Reads until the process ends. Raises FrameError for an invalid answer, TimeoutError when none
        arrives."""
        assert process.stdout is not None
        decoder: FrameDecoder[FromProcess] = FrameDecoder(FromProcess)
        reading = asyncio.ensure_future(process.stdout.read(READ_BYTES))
        try:
            while True:
                await asyncio.wait((reading,), timeout=SILENT_S)
                if not reading.done():
                    if self._outputs.is_asked and time.monotonic() - self._answered_s > SILENT_S:
                        raise TimeoutError("no answer")
                    continue
                if not (data := reading.result()):
                    return
                for answer in decoder.feed(data):
                    self._deliver(answer)
                self._ask()
                reading = asyncio.ensure_future(process.stdout.read(READ_BYTES))
        finally:
            reading.cancel()

    def _deliver(self, answer: FromProcess) -> None:
        self._has_answered, self._answered_s = True, time.monotonic()
        client = self._outputs.oldest_client
        if self._outputs.answered(answer):
            match answer:
                case Mask():
                    self._listener.on_mask(answer.key, answer.num_tokens, answer.bits)
                case GrammarRefused():
                    self._listener.on_refused(answer.key, answer.why)
        assert client is not None, "an answer to nothing is an error"
        self._on_cost(client, answer.cost_s)


def _kill(process: Process) -> None:
    """Kills the process. Not for one that ends by itself: a kill through subprocess takes its exit code away
    from asyncio."""
    with suppress(ProcessLookupError):
        process.kill()
