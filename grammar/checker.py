"""The gateway's question about a grammar before it lets a request in: is it one, and can it be afforded?"""

import asyncio
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ..core.errors import NoWorkerAvailable, QueueFull
from .messages import Setup
from .process import GrammarProcess

MAX_KNOWN = 1024  # grammars that were found good
MAX_WAITING = 64
RETRY_S = 1.0


class GrammarChecker:
    """Used on one asyncio loop. The process starts with the first question."""

    def __init__(self, set_up: Callable[[], Setup]) -> None:
        self._set_up = set_up
        self._process: GrammarProcess | None = None
        self._keys = itertools.count()
        self._answers: dict[int, asyncio.Future[str | None]] = {}
        self._known: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._num_waiting = 0

    async def check(self, grammar: str, client: str) -> str | None:
        """Why requests cannot follow `grammar`, or None when they can. Each client has one grammar checked at a time, so that
        one with many costly ones does not keep the others waiting.

        Raises QueueFull when many wait for an answer; NoWorkerAvailable when it cannot be found out.
        """
        if grammar not in self._known:
            async with self._turn(client):
                why = None if grammar in self._known else await self._ask(grammar)
            if why is not None:
                return why
            self._known[grammar] = None
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(grammar)
        return None

    async def stop(self) -> None:
        """End the process; idempotent."""
        if self._process is not None:
            await self._process.stop()

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        if self._num_waiting >= MAX_WAITING:
            raise QueueFull(MAX_WAITING, RETRY_S)
        self._num_waiting += 1
        try:
            async with self._turns[client]:
                yield
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._turns.clear()

    async def _ask(self, grammar: str) -> str | None:
        """What is wrong with it, if anything."""
        if self._process is None:
            self._process = GrammarProcess(self._set_up, self)
        key = next(self._keys)
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        self._process.open(key, grammar, probe=True)
        try:
            return await answer
        finally:
            del self._answers[key]
            self._process.close(key)

    # of GrammarListener

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._settle(key, None)

    def on_refused(self, key: int, why: str) -> None:
        self._settle(key, why)

    def on_failed(self, key: int, why: str) -> None:
        answer = self._answers[key]
        if not answer.done():
            answer.set_exception(NoWorkerAvailable(why))

    def _settle(self, key: int, why: str | None) -> None:
        answer = self._answers[key]
        if not answer.done():
            answer.set_result(why)
