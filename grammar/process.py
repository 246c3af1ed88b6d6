"""Asks the grammar process, and never waits for it."""

import asyncio
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import Protocol

from ..core.codec import FrameDecoder, FrameEncoder
from ..core.limited_child import READ_BYTES, Death, LimitedChild
from .messages import JOB_S, FromProcess, GrammarRefused, GrammarSetup, Mask, ToProcess
from .outputs import Outputs

# a process without an answer for this long is stopped or starved; its jobs end after half a second of work
SILENT_S = 30.0
NICENESS = 10  # a worker's own computing goes first


class GrammarListener(Protocol):
    """Hears, on the loop, what became of each request: one call each, unless its key was closed."""

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None: ...
    def on_refused(self, key: int, why: str) -> None:
        """The grammar is to blame; the key is closed."""

    def on_failed(self, key: int, why: str) -> None:
        """The grammar is not to blame; the key is closed."""


class GrammarProcess(LimitedChild[GrammarSetup]):
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
        super().__init__("grammar", set_up, f"{__package__}.main", str(niceness))
        self._on_cost = on_cost
        self._listener = listener
        self._outputs = Outputs()
        self._encoder = FrameEncoder()
        self._answered_s = 0.0  # when the last answer came, or the first question after it
        self._has_answered = False  # the current process

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

    def _note_question(self) -> None:
        if not self._outputs.is_asked:
            self._answered_s = time.monotonic()

    def _ask(self) -> None:
        if self._process is not None:
            for request in self._outputs.requests():
                self._send(request)
        elif self._outputs.is_asked:
            self.need()

    def _send(self, message: ToProcess) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(self._encoder.encode(message))

    def _on_death(self, death: Death) -> bool:
        has_answered, self._has_answered = self._has_answered, False
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
        if has_answered or death is not Death.OTHER:
            return False
        for key in self._outputs.give_up():
            self._listener.on_failed(key, "the grammar process does not start")
        return True

    def _has_jobs(self) -> bool:
        return self._outputs.is_asked

    async def _converse(self, process: Process, ended: "asyncio.Future[int]", setup: GrammarSetup) -> None:
        assert process.stdin is not None
        self._encoder = FrameEncoder()
        self._answered_s = time.monotonic()
        process.stdin.write(self._encoder.encode(setup))
        self._ask()
        await self._read(process)

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
