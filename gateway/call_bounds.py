"""Bounds on what clients hold open: calls, bytes of messages and bodies, and messages that have not come in whole yet.

Each is bounded in total, and for one client within that, so that no client can take all of it. `client` is the name that
`client_of` gives: that of the key, or else a group of addresses.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from ..core.errors import PdserveError
from .access import Caller
from .places import FairPlaces, NoPlace, address_group

CALLS_OF_ONE_CLIENT = 0.5  # of all
BYTES_OF_ONE_CLIENT = 0.25
READS_OF_ONE_CLIENT = 0.25
MESSAGE_TIMEOUT_S = 60.0  # for a whole message, or the whole body of an HTTP request
PATIENCE_S = 2.0  # a message that takes longer makes room when others wait
RETRY_S = 1.0


class TooManyBytes(PdserveError):
    """Messages and bodies that are being worked on have used up the memory that they may take."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.retry_after_s = RETRY_S
        super().__init__(f"messages of {limit} bytes are being worked on already, retry in {RETRY_S:.1f} s")


class TooSlow(PdserveError):
    """A message did not come in whole in time."""

    def __init__(self, what: str, after_s: float) -> None:
        super().__init__(f"the {what} did not come within {after_s:g} s")


def client_of(caller: Caller | None, host: str) -> str:
    """Whom open calls and held bytes count for."""
    return f"address:{address_group(host)}" if caller is None else caller.client


class HeldBytes:
    """Counts the bytes of messages and bodies from when they come in until their call ends. Pure."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_of_one = int(max_bytes * BYTES_OF_ONE_CLIENT)
        self._num_bytes: Counter[str] = Counter()  # by client
        self.total = 0

    def take(self, client: str, num_bytes: int) -> None:
        """Raises TooManyBytes, and takes nothing then."""
        if self._num_bytes[client] + num_bytes > self._max_of_one:
            raise TooManyBytes(self._max_of_one)
        if self.total + num_bytes > self._max_bytes:
            raise TooManyBytes(self._max_bytes)
        self._num_bytes[client] += num_bytes
        self.total += num_bytes

    def give_back(self, client: str, num_bytes: int) -> None:
        self._num_bytes[client] -= num_bytes
        self.total -= num_bytes
        assert self._num_bytes[client] >= 0, client
        if not self._num_bytes[client]:
            del self._num_bytes[client]

    @contextmanager
    def hold(self, client: str, num_bytes: int) -> Iterator[None]:
        """Around working on a message. Raises TooManyBytes."""
        self.take(client, num_bytes)
        try:
            yield
        finally:
            self.give_back(client, num_bytes)


class OpenCalls:
    """Places for calls, each held from the call's start to its end, whether its message has come or not."""

    def __init__(self, max_calls: int) -> None:
        self._places: FairPlaces[object] = FairPlaces("calls", max_calls, max(1, int(max_calls * CALLS_OF_ONE_CLIENT)))

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Around a call. Raises NoPlace."""
        call = object()
        self._places.take(client, call)
        self._places.pin(call)
        try:
            yield
        finally:
            self._places.leave(call)


class KeylessCalls:
    """Places for calls that anybody may make, such as health checks. They are few, and a newcomer takes the oldest's place."""

    MAX_CALLS = 256
    MAX_OF_ONE_ADDRESS = 64
    MAX_OF_ONE_CONNECTION = 4

    def __init__(self) -> None:
        self._places: FairPlaces[asyncio.Timeout] = FairPlaces("keyless calls", self.MAX_CALLS, self.MAX_OF_ONE_ADDRESS)
        self._of_connection: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def enter(self, client: str, connection: str) -> AsyncIterator[None]:
        """Around a call. Raises NoPlace at its start, or later when a newcomer needed its place."""
        if self._of_connection[connection] >= self.MAX_OF_ONE_CONNECTION:
            raise NoPlace("keyless calls of this connection", self.MAX_OF_ONE_CONNECTION)
        self._of_connection[connection] += 1
        limit = asyncio.timeout(None)
        try:
            async with limit:
                evicted = self._places.take(client, limit)
                if evicted is not None:
                    evicted.reschedule(asyncio.get_running_loop().time())
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
    """Messages that are being received: gRPC assembles each in memory before anybody sees a byte, so their number is bounded.

    More wait for their turn. A read that takes longer than `PATIENCE_S` is ended when others wait.
    """

    def __init__(self, max_reads: int) -> None:
        self._max_reads = max_reads
        self._max_of_one = max(1, int(max_reads * READS_OF_ONE_CLIENT))
        self._began_s: dict[asyncio.Timeout, float] = {}  # oldest first
        self._num_of: Counter[str] = Counter()  # by client
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()  # none of these would fit
        self._hurry: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._num_of.total()

    @asynccontextmanager
    async def read(self, client: str) -> AsyncIterator[None]:
        """Around receiving a message. Raises TooSlow when it does not come in time."""
        loop = asyncio.get_running_loop()
        limit, began_s = asyncio.timeout(MESSAGE_TIMEOUT_S), loop.time()
        try:
            async with limit:
                if self._fits(client):
                    self._num_of[client] += 1
                else:
                    await self._turn(client)
                self._began_s[limit] = loop.time()
                try:
                    yield
                finally:
                    del self._began_s[limit]
                    self._leave(client)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TooSlow("message", round(loop.time() - began_s, 1)) from None

    def _fits(self, client: str) -> bool:
        return len(self) < self._max_reads and self._num_of[client] < self._max_of_one

    async def _turn(self, client: str) -> None:
        """Returns when `_leave` has given the place of another to this client."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((client, turn))
        self._hurry_slow_ones()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(client)
            else:
                self._waiting.remove((client, turn))
            raise

    def _leave(self, client: str) -> None:
        self._num_of[client] -= 1
        if not self._num_of[client]:
            del self._num_of[client]
        following = next(((other, turn) for other, turn in self._waiting if not turn.done() and self._fits(other)), None)
        if following is not None:
            self._waiting.remove(following)
            self._num_of[following[0]] += 1
            following[1].set_result(None)

    def _hurry_slow_ones(self) -> None:
        """End reads that take long while others wait for a turn, as soon as they have had their time."""
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for limit, began_s in self._began_s.items():
            if began_s + PATIENCE_S > now_s:
                self._hurry = loop.call_at(began_s + PATIENCE_S, self._hurry_slow_ones)
                return
            if not limit.expired() and limit.when() != now_s:
                limit.reschedule(now_s)
