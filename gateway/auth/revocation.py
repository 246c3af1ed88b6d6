"""Ends the calls of keys that are taken away, soon after and without another call. `Access` decides; here is
the timer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ...core.errors import PdserveError
from .access import Access, Caller, RequiredAccess

LOOK_S = 0.5


@dataclass(eq=False)
class _Call:
    caller: Caller
    need: RequiredAccess
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    reason: PdserveError | None = None


class Revocation:
    """The open calls of one server's keys."""

    def __init__(self, access: Access | None) -> None:
        """Without keys there is nothing to do."""
        self._access = access
        self._version = 0  # of the keys that the calls have been compared with
        self._calls: set[_Call] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def start(self) -> None:
        """Look now and then, from now on; on the running loop."""
        if self._access is not None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self.start)
            self.look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """End what is open by keys that are not in force any more."""
        assert self._access is not None
        now_s = asyncio.get_running_loop().time()
        self._access.look(now_s)
        if self._access.version == self._version:
            return
        self._version = self._access.version
        for call in self._calls:
            try:
                self._access.check_still(call.caller, call.need)
            except PdserveError as error:
                if call.reason is None:
                    call.reason = error
                    call.limit.reschedule(now_s)

    @asynccontextmanager
    async def watch(self, caller: Caller | None, need: RequiredAccess) -> AsyncIterator[None]:
        """Around a call, from when it was admitted. Raises Revoked or NotPermitted when its key may not do
        that any more."""
        if self._access is None or caller is None:
            yield
            return
        self._access.check_still(caller, need)  # time may have passed, and a look
        call = _Call(caller, need)
        self._calls.add(call)
        try:
            async with call.limit:
                yield
        except TimeoutError:
            if call.reason is None or not call.limit.expired():
                raise
            raise call.reason from None
        finally:
            self._calls.discard(call)
