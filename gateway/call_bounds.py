"""Bounds on the resources that clients hold: calls, bytes of messages and bodies, and messages still being
received.

Each is bounded in total, and within that per client, so that no client can take all of it. `client` is the
name that `client_of` returns: the key's name, or else a group of addresses."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache
from urllib.parse import unquote

from ..core.errors import PdserveError
from ..core.held_bytes import Shares
from .auth.access import Caller
from .places import NAMES_KEPT, FairPlaces, NoPlace, address_group

CALLS_SPARE = 1  # one client may have half of them
READS_OF_ONE_CLIENT = 0.25
MESSAGE_TIMEOUT_S = 60.0  # for a whole message, or the whole body of an HTTP request
QUICK_S = 0.1  # a message that takes longer than this needs one of the places for slow ones


class TooSlow(PdserveError):
    """A message was not received in full in time."""

    def __init__(self, what: str, after_s: float) -> None:
        super().__init__(f"the {what} did not come within {after_s:g} s")


def client_of(caller: Caller | None, host: str) -> str:
    """Returns the client that everything counts for: requests in their queue, open calls, held bytes and work
    ahead of the queue. Nothing that a client sends can change it."""
    return f"address:{address_group(host)}" if caller is None else caller.client


@lru_cache(NAMES_KEPT)
def host_of(peer: str) -> str:
    """Returns the host in gRPC's name for a peer, such as `ipv4:10.1.2.3:4567` or `ipv6:%5B::1%5D:4567`, or
    in ours, `http:HOST`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind == "http":
        return rest
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def expire(limit: asyncio.Timeout) -> None:
    """Expires the timeout at once."""
    with suppress(RuntimeError):  # it is ending already
        limit.reschedule(asyncio.get_running_loop().time())


class OpenCalls:
    """Places for calls, each held from the call's start to its end, whether its message has arrived or
    not."""

    def __init__(self, max_calls: int) -> None:
        self._shares = Shares(max_calls, CALLS_SPARE)

    def __len__(self) -> int:
        return self._shares.total

    @contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Wraps a call. Raises NoPlace."""
        if not self._shares.take(client, 1):
            raise NoPlace("calls of one client", self._shares.of(client))
        try:
            yield
        finally:
            self._shares.give_back(client, 1)


class KeylessCalls:
    """Places for unauthenticated calls, such as health checks. They are few, and a new call takes the oldest
    one's place."""

    MAX_CALLS = 256
    MAX_OF_ONE_ADDRESS = 64
    MAX_OF_ONE_CONNECTION = 4

    def __init__(self) -> None:
        self._places: FairPlaces[asyncio.Timeout] = FairPlaces(
            "keyless calls", self.MAX_CALLS, self.MAX_OF_ONE_ADDRESS
        )
        self._of_connection: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def enter(self, client: str, connection: str) -> AsyncIterator[None]:
        """Wraps a call. Raises NoPlace at its start, or later when a new call takes its place."""
        if self._of_connection[connection] >= self.MAX_OF_ONE_CONNECTION:
            raise NoPlace("keyless calls of this connection", self.MAX_OF_ONE_CONNECTION)
        self._of_connection[connection] += 1
        limit = asyncio.timeout(None)
        try:
            async with limit:
                evicted = self._places.take(client, limit)
                if evicted is not None:
                    expire(evicted)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise NoPlace("keyless calls", self.MAX_CALLS) from None
        finally:
            self._places.leave(limit)
            self._of_connection[connection] -= 1
            if not self._of_connection[connection]:
                del self._of_connection[connection]


class PendingReads:
    """Messages being received: gRPC assembles each in memory before any of our code sees a byte of it.

    A message that has not arrived within `QUICK_S` needs a place, of which there are as many as memory
    allows; a new one takes the oldest one's. The network's speed bounds how much arrives before a place is
    needed.
    """

    def __init__(self, max_reads: int) -> None:
        max_of_one = max(1, int(max_reads * READS_OF_ONE_CLIENT))
        self._places: FairPlaces[asyncio.Timeout] = FairPlaces(
            "messages that come slowly", max_reads, max_of_one
        )

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def read(self, client: str) -> AsyncIterator[None]:
        """Wraps the receipt of a message. Raises TooSlow, or NoPlace when a new message takes its place."""
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)  # most messages are there before it is set
        due_s = loop.time() + MESSAGE_TIMEOUT_S
        try:
            async with limit:
                slow = loop.call_later(QUICK_S, self._take_place, client, limit, due_s)
                try:
                    yield
                finally:
                    slow.cancel()
                    self._places.leave(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            if loop.time() < due_s:
                raise NoPlace(self._places.what, self._places.max_places) from None
            raise TooSlow("message", MESSAGE_TIMEOUT_S) from None

    def _take_place(self, client: str, limit: asyncio.Timeout, due_s: float) -> None:
        limit.reschedule(due_s)
        evicted = self._places.take(client, limit)
        if evicted is not None:
            expire(evicted)
