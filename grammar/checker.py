"""The gateway's check of a grammar before it admits a request: whether it is valid and affordable."""

import asyncio
import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable

from ..core.errors import NoWorkerAvailable, QueueFull
from .lanes import GrammarLanes
from .messages import GrammarSetup

MAX_KNOWN = 1024  # grammars whose answers are remembered
MAX_QUESTIONS = 1024  # that wait for an answer
MAX_QUESTIONS_EACH = 64  # per client
RETRY_S = 1.0


class GrammarChecker:
    """Used on one asyncio loop. A process starts with the first question.

    Each client has one grammar checked at a time, so that one with many costly ones does not keep the others
    waiting. A question continues when its caller is gone: the client may have asked the same again, or would.
    """

    def __init__(self, set_up: Callable[[], GrammarSetup]) -> None:
        self._set_up = set_up
        self._lanes: GrammarLanes | None = None
        self._keys = itertools.count()
        self._answers: dict[int, asyncio.Future[str | None]] = {}
        # by digest what is wrong; least recently used first
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._questions: dict[
            tuple[str, str], asyncio.Task[str | None]
        ] = {}  # by client; none waits for another's
        self._turns: dict[str, asyncio.Lock] = {}
        self._num_questions: Counter[str] = Counter()  # by client

    async def check(self, grammar: str, client: str) -> str | None:
        """Returns why requests cannot follow `grammar`, or None when they can.

        Raises QueueFull when many wait for an answer; NoWorkerAvailable when it cannot be found out.
        """
        digest = _digest(grammar)
        if digest in self._known:
            self._known.move_to_end(digest)
            return self._known[digest]
        question = self._questions.get((client, grammar))
        if question is None:
            # one place in eight is reserved for clients that have none
            limit = MAX_QUESTIONS * 7 // 8 if self._num_questions[client] else MAX_QUESTIONS
            if self._num_questions[client] >= MAX_QUESTIONS_EACH or len(self._questions) >= limit:
                raise QueueFull(MAX_QUESTIONS_EACH, RETRY_S)
            self._num_questions[client] += 1
            question = asyncio.get_running_loop().create_task(self._find_out(grammar, client))
            # the caller may be gone
            question.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._questions[client, grammar] = question
        return await asyncio.shield(question)

    async def stop(self) -> None:
        """End the processes; idempotent. Questions get no answer any more."""
        for question in self._questions.values():
            question.cancel()
        if self._lanes is not None:
            await self._lanes.stop()

    async def _find_out(self, grammar: str, client: str) -> str | None:
        try:
            async with self._turns.setdefault(client, asyncio.Lock()):
                why = await self._ask(grammar, client)
            self._known[_digest(grammar)] = why
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            return why
        finally:
            del self._questions[client, grammar]
            self._num_questions[client] -= 1
            if not self._num_questions[client]:
                del self._num_questions[client], self._turns[client]

    async def _ask(self, grammar: str, client: str) -> str | None:
        """Returns why the grammar is refused, or None."""
        if self._lanes is None:
            self._lanes = GrammarLanes(self._set_up, self)
        key = next(self._keys)
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        self._lanes.open(key, grammar, (), client, probe=True)
        try:
            return await answer
        finally:
            del self._answers[key]
            self._lanes.close(key)

    # methods of GrammarListener

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._settle(key, None)

    def on_refused(self, key: int, why: str) -> None:
        self._settle(key, why)

    def on_failed(self, key: int, why: str) -> None:
        if not self._answers[key].done():
            self._answers[key].set_exception(NoWorkerAvailable(why))

    def _settle(self, key: int, why: str | None) -> None:
        if not self._answers[key].done():  # it is cancelled when we stop
            self._answers[key].set_result(why)


def _digest(grammar: str) -> bytes:
    """The digest that is cached in place of a grammar, which may be long."""
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()
