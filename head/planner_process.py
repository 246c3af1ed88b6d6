"""The parent's side of the planner process: summaries to it, advice from it."""

import asyncio
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ..core.codec import FrameDecoder, FrameEncoder
from ..core.limited_child import READ_BYTES, Death, LimitedChild
from ..router.planning import Advice, Summary

MAX_WAITING = 64  # summaries that a busy process has yet to read; older ones are dropped


class PlannerProcess(LimitedChild[None]):
    """Used on one asyncio loop. The first summary starts the process; one that has died is started again with
    the next."""

    def __init__(self, on_advice: Callable[[Advice], object]) -> None:
        super().__init__("planner", lambda: None, "pdserve.planner.main")
        self._on_advice = on_advice
        self._waiting: deque[Summary] = deque(maxlen=MAX_WAITING)
        self._has_answered = False  # the current process

    def tell(self, summary: Summary) -> None:
        self._waiting.append(summary)
        self.need()

    def _on_death(self, death: Death) -> bool:
        has_answered, self._has_answered = self._has_answered, False
        return not has_answered

    def _has_jobs(self) -> bool:
        return bool(self._waiting)

    async def _converse(self, process: Process, ended: "asyncio.Future[int]", setup: None) -> None:
        assert process.stdin is not None
        encoder = FrameEncoder()
        reading = asyncio.ensure_future(self._read(process))
        try:
            while True:
                self._needed.clear()
                while self._waiting:
                    process.stdin.write(encoder.encode(self._waiting.popleft()))
                    await process.stdin.drain()
                needed = asyncio.ensure_future(self._needed.wait())
                await asyncio.wait((needed, reading, ended), return_when=asyncio.FIRST_COMPLETED)
                needed.cancel()
                if reading.done() or ended.done():
                    await reading  # raises what it met
                    return
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await reading

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        decoder: FrameDecoder[Advice] = FrameDecoder(Advice)
        while data := await process.stdout.read(READ_BYTES):
            for advice in decoder.feed(data):
                self._has_answered = True
                self._on_advice(advice)
