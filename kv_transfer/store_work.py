"""What a store's device has yet to do for transfers: their endings wait for it, since it still reads or writes their blocks."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from ..core.request import TransferId
from .interfaces import Pending, Slot
from .link import LinkError, release

if TYPE_CHECKING:
    from .pair import Local

POLL_S = 20e-6  # far below what a chunk takes, and a device cannot call us


class StoreWaits:
    """A `Waiter` for all of an endpoint's pairs: one thread, as the store does its works in order."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="pdserve-kv-store")  # no thread before its first work
        self._num_waiting = 0
        self._nobody_waits = asyncio.Event()
        self._nobody_waits.set()
        self._is_stopped = False

    def wait(self, ticket: "_Work", timeout_s: float) -> None:
        """As long as it takes: a device that is late still touches the blocks. Deadlines are the machines' business."""
        while not ticket.pending.is_done():
            if self._is_stopped:
                raise LinkError("the endpoint was closed before the device was done")
            time.sleep(POLL_S)
        ticket.checksum = ticket.pending.collect()

    def count(self, change: int) -> None:
        """Works that have begun, or whose end was heard of."""
        self._num_waiting += change
        if self._num_waiting:
            self._nobody_waits.clear()
        else:
            self._nobody_waits.set()

    async def finish(self, timeout_s: float) -> None:
        """Wait for what is under way, and give up on what is later than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nobody_waits.wait()
        self._is_stopped = True
        await self._nobody_waits.wait()
        self.executor.shutdown()


class _Work:
    """A ticket."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.checksum = 0


class StoreWork:
    """One pair's works. All on the endpoint's thread."""

    def __init__(self, local: "Local") -> None:
        self._local = local
        self._num: defaultdict[TransferId, int] = defaultdict(int)  # under way
        self._behind: dict[TransferId, list[Callable[[], None]]] = {}

    @property
    def is_idle(self) -> bool:
        return not self._num

    def is_under_way(self, transfer: TransferId) -> bool:
        return transfer in self._num

    def add(self, transfer: TransferId, pending: Pending, slot: Slot, done: Callable[[int | BaseException], None]) -> None:
        """`done` hears the checksum, or what went wrong, also when the link has gone by then; `slot` is kept until then."""
        work = _Work(pending)
        self._num[transfer] += 1
        self._local.store_waits.count(1)
        self._local.wait(self._local.store_waits, work, inf, partial(self._on_done, transfer, work, slot, done))

    def after(self, transfer: TransferId, call: Callable[[], None]) -> None:
        """Call now, or when nothing is under way for the transfer."""
        if transfer in self._num:
            self._behind.setdefault(transfer, []).append(call)
        else:
            call()

    def _on_done(
        self,
        transfer: TransferId,
        work: _Work,
        slot: Slot,
        done: Callable[[int | BaseException], None],
        error: BaseException | None,
    ) -> None:
        release(slot)
        try:
            done(work.checksum if error is None else error)
        finally:
            self._local.store_waits.count(-1)
            self._num[transfer] -= 1
            if not self._num[transfer]:
                del self._num[transfer]
                for call in self._behind.pop(transfer, ()):
                    call()
