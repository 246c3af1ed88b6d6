"""Two grammar processes: one shared by all clients, and one for those whose grammars cost much CPU time.

A process is at work on one job at a time, for up to half a second. So the outputs of a client that turns
costly leave the common process, and those of others never wait for them."""

import time
from collections.abc import Callable

from .costs import ClientCosts
from .messages import GrammarSetup
from .process import GrammarListener, GrammarProcess

NICENESS_OF_COSTLY = 19  # all other work on the processor goes first


class GrammarLanes:
    """Used on one asyncio loop, as a `GrammarProcess`. A process starts when it is needed first."""

    def __init__(self, set_up: Callable[[], GrammarSetup], listener: GrammarListener) -> None:
        """`set_up` is called on a thread, once for each process."""
        self._listener = listener
        self._costs = ClientCosts()
        self._common = GrammarProcess(set_up, self, self._on_cost)
        self._costly = GrammarProcess(set_up, self, self._on_cost, NICENESS_OF_COSTLY)
        self._process_of: dict[int, GrammarProcess] = {}

    def open(
        self, key: int, grammar: str, token_ids: tuple[int, ...], client: str, *, probe: bool = False
    ) -> None:
        """See `GrammarProcess.open`."""
        process = self._costly if self._costs.is_costly(client, time.monotonic()) else self._common
        self._process_of[key] = process
        process.open(key, grammar, token_ids, probe=probe, client=client)

    def advance(self, key: int, token_id: int) -> None:
        if (process := self._process_of.get(key)) is not None:  # it was not given up
            process.advance(key, token_id)

    def close(self, key: int) -> None:
        if (process := self._process_of.pop(key, None)) is not None:
            process.close(key)

    async def stop(self) -> None:
        """End the processes; idempotent."""
        await self._common.stop()
        await self._costly.stop()

    def _on_cost(self, client: str, cost_s: float) -> None:
        if self._costs.charge(client, cost_s, time.monotonic()):
            for key in self._common.hand_over(client, self._costly):
                self._process_of[key] = self._costly

    # methods of GrammarListener

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._listener.on_mask(key, num_tokens, bits)

    def on_refused(self, key: int, why: str) -> None:
        self._process_of.pop(key, None)
        self._listener.on_refused(key, why)

    def on_failed(self, key: int, why: str) -> None:
        self._process_of.pop(key, None)
        self._listener.on_failed(key, why)
