"""Work that a store's device has yet to do for transfers: their ends wait for it, since it still reads or
writes their blocks."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..core.request import TransferId
from .interfaces import Pending, Slot
from .link import LinkError, release

Done = Callable[[int | BaseException], None]  # receives the checksum, or the error


class StoreWaits:
    """The works of all of an endpoint's pairs, in the order in which the store's device does them. The device
    cannot call us, so it is polled by the endpoint's loop, where that waits for its sockets
    (`PollingSelector`). A polling thread costs a chunk as much as all other work that its host does for
    it."""

    def __init__(self) -> None:
        self._works: deque[tuple[Pending, Done]] = deque()
        self._nobody_waits = asyncio.Event()
        self._nobody_waits.set()
        self._is_stopped = False

    def add(self, pending: Pending, done: Done) -> None:
        """Calls `done` when the store has done the work, however long that takes: a device that is late still
        accesses the blocks. Deadlines are the machines' responsibility."""
        self._works.append((pending, done))
        self._nobody_waits.clear()

    @property
    def is_idle(self) -> bool:
        return not self._works

    def take_ended(self) -> list[Callable[[], None]]:
        """Returns the calls by which completed works are reported, each once."""
        ended: list[Callable[[], None]] = []
        while self._works and (result := self._result(self._works[0][0])) is not None:
            ended.append(partial(self._works.popleft()[1], result))
        if ended and not self._works:
            ended.append(self._settle)
        return ended

    async def finish(self, timeout_s: float) -> None:
        """Waits for works under way, and gives up on those that take longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nobody_waits.wait()
        self._is_stopped = True
        await self._nobody_waits.wait()

    def _result(self, pending: Pending) -> int | BaseException | None:
        """None: not yet."""
        try:
            if pending.is_done():
                return pending.collect()
        except Exception as error:  # a device error: it ends that transfer, and not those that wait behind it
            return error
        return LinkError("the endpoint was closed before the device was done") if self._is_stopped else None

    def _settle(self) -> None:
        if not self._works:  # the previous reports may have added works
            self._nobody_waits.set()


class StoreWork:
    """One pair's works. All on the endpoint's thread."""

    def __init__(self, waits: StoreWaits) -> None:
        self._waits = waits
        self._num: defaultdict[TransferId, int] = defaultdict(int)  # under way
        self._behind: dict[TransferId, list[Callable[[], None]]] = {}

    @property
    def is_idle(self) -> bool:
        return not self._num

    def is_under_way(self, transfer: TransferId) -> bool:
        return transfer in self._num

    def add(self, transfer: TransferId, pending: Pending, slot: Slot, done: Done) -> None:
        """Calls `done` even when the link has gone by then; `slot` is kept until then."""
        self._num[transfer] += 1
        self._waits.add(pending, partial(self._on_done, transfer, slot, done))

    def after(self, transfer: TransferId, call: Callable[[], None]) -> None:
        """Calls now, or when nothing is under way for the transfer."""
        if transfer in self._num:
            self._behind.setdefault(transfer, []).append(call)
        else:
            call()

    def _on_done(self, transfer: TransferId, slot: Slot, done: Done, result: int | BaseException) -> None:
        release(slot)
        try:
            done(result)
        finally:
            self._num[transfer] -= 1
            if not self._num[transfer]:
                del self._num[transfer]
                for call in self._behind.pop(transfer, ()):
                    call()
