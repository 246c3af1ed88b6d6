"""The grammar process of a simulated worker: any token may come next, but that is known only after a delay; a
long one when the process had to be restarted."""

from collections.abc import Callable
from random import Random

from .virtual_time import VirtualProcess

MASK_S = 0.002  # at most; the steps of simulated workers take as long
RESTART_S = 0.5
NO_TOKEN_IS_RULED_OUT = b""  # the simulator's model ignores it


class SimulatedMasks:
    """Implements `engine.MaskPort`. Answers come in the order of the questions."""

    def __init__(
        self,
        process: VirtualProcess,
        rng: Random,
        now_s: Callable[[], float],
        answer: Callable[[int, int], None],
    ) -> None:
        """`answer` gets (key, number of output tokens)."""
        self._process, self._rng, self._now_s, self._answer = process, rng, now_s, answer
        self._num_tokens: dict[int, int] = {}
        self._last_s = 0.0

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None:
        self._num_tokens[key] = len(token_ids)
        self._ask(key)

    def advance(self, key: int, token_id: int) -> None:
        self._num_tokens[key] += 1
        self._ask(key)

    def close(self, key: int) -> None:
        del self._num_tokens[key]

    def _ask(self, key: int) -> None:
        takes_s = RESTART_S if self._rng.random() < 0.01 else MASK_S * self._rng.random()
        self._last_s = max(self._last_s, self._now_s()) + takes_s
        self._process.call_at(self._last_s, lambda: self._reply(key))

    def _reply(self, key: int) -> None:
        if key in self._num_tokens:
            self._answer(key, self._num_tokens[key])
