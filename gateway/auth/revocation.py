"""Ends the calls of revoked keys promptly, without waiting for another call. `Access` decides; this module
owns the timer."""

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
        """Does nothing if the server has no keys."""
        self._access = access
        self._version = 0  # the version of the keys that the calls have been checked against
        self._calls: set[_Call] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def start(self) -> None:
        """Starts periodic checks on the running loop."""
        if self._access is not None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self.start)
            self.look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """Ends the open calls of keys that are no longer in force."""
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
        """Wraps a call from its admission on. Raises Revoked or NotPermitted once its key no longer permits
        the call."""
        if self._access is None or caller is None:
            yield
            return
        self._access.check_still(caller, need)  # time may have passed since, and another look
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
