"""Handmade records, and a scripted target and clock."""

import asyncio
from collections.abc import Callable, Sequence

from pdserve.loadgen.errors import LoadRequestFailed
from pdserve.loadgen.records import CompletedRequest, GeneratorLoad, Legs, RequestRecord, Round, TokenChunk
from pdserve.loadgen.target import LoadRequest, ModelFacts, OnTokens

IDLE = GeneratorLoad(cpu_s=0.0, wall_s=1.0, loop_lags_s=())


def record(
    index: int = 0,
    sent_s: float = 0.0,
    at_s: Sequence[float] = (0.1, 0.2),
    num_prompt_tokens: int = 10,
    due_s: float | None = None,
    error: str | None = None,
    legs: Legs | None = None,
) -> RequestRecord:
    """One token at each of `at_s`."""
    answer = None if error else CompletedRequest(num_prompt_tokens, len(at_s), 0, legs)
    ended_s = at_s[-1] if at_s else sent_s
    chunks = tuple(TokenChunk(instant_s, 1) for instant_s in at_s)
    return RequestRecord(index, due_s, sent_s, ended_s, num_prompt_tokens, chunks, answer, error)


def one_round(*records: RequestRecord, generator: GeneratorLoad = IDLE) -> Round:
    return Round(tuple(records), generator)


class ManualClock:
    """Time advances when a task waits for it, after all other tasks have had a turn."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    async def sleep_until(self, at_s: float) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.at_s = max(self.at_s, at_s)


class ManualTarget:
    """Keeps every request open until `answer_all`, unless it answers at once."""

    def __init__(self, clock: ManualClock, at_once: bool = False) -> None:
        self._clock = clock
        self.at_once = at_once
        self.fails_with: str | None = None
        self.requests: list[LoadRequest] = []
        self.sent_s: list[float] = []
        self.num_open = 0
        self.max_open = 0
        self.on_send: Callable[[], object] = lambda: None
        self._answer = asyncio.Event()

    async def facts(self) -> ModelFacts:
        return ModelFacts("manual", vocab_size=100, max_model_len=1000, special_token_ids=(5,))

    def answer_all(self) -> None:
        self._answer.set()

    async def send(self, request: LoadRequest, on_tokens: OnTokens) -> CompletedRequest:
        self.requests.append(request)
        self.sent_s.append(self._clock.now_s())
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        self.on_send()
        try:
            await (asyncio.sleep(0) if self.at_once else self._answer.wait())
            if self.fails_with is not None:
                raise LoadRequestFailed(self.fails_with, "on purpose")
            for _ in range(request.max_tokens):
                on_tokens(1)
            return CompletedRequest(len(request.token_ids), request.max_tokens)
        finally:
            self.num_open -= 1

    async def close(self) -> None:
        pass
