"""The grammar processes of a worker, driven by a thread of their own.

The engine's thread asks, and gets its answers through its inbox.
"""

import asyncio
import threading
from collections.abc import Callable

from .lanes import GrammarLanes
from .messages import GrammarSetup
from .process import GrammarListener


class GrammarThread:
    """Calls are made on one thread and return at once; `listener` is called on the grammar thread. Nothing
    runs before the first output is opened."""

    def __init__(self, set_up: Callable[[], GrammarSetup], listener: GrammarListener) -> None:
        """`set_up` is called on the grammar thread."""
        self._set_up, self._listener = set_up, listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="grammar", daemon=True)
        self._lanes: GrammarLanes | None = None  # on the grammar thread

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None:
        """See `GrammarLanes.open`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread.start()
        self._call(lambda lanes: lanes.open(key, grammar, token_ids, client))

    def advance(self, key: int, token_id: int) -> None:
        self._call(lambda lanes: lanes.advance(key, token_id))

    def close(self, key: int) -> None:
        self._call(lambda lanes: lanes.close(key))

    def stop(self) -> None:
        """End thread and processes; idempotent."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def _call(self, call: Callable[[GrammarLanes], None]) -> None:
        assert self._loop is not None, "no output was opened"
        self._loop.call_soon_threadsafe(self._on_loop, call)

    def _on_loop(self, call: Callable[[GrammarLanes], None]) -> None:
        if self._lanes is None:
            self._lanes = GrammarLanes(self._set_up, self._listener)
        call(self._lanes)

    def _run(self) -> None:
        assert self._loop is not None
        self._loop.run_forever()
        if self._lanes is not None:
            self._loop.run_until_complete(self._lanes.stop())
