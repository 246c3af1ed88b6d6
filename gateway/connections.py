"""The connections of a server: how many it may hold, from whom, and which one is closed for a new one.

`FairPlaces` decides. HTTP asks it when it accepts a connection. gRPC's library accepts by itself and has one
bound for all peers, so `GrpcConnections` looks at the server's sockets twice a second, more often in a flood,
and closes those that have lost their places or misuse them."""

import asyncio
import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from ..core.peer_log import peer_log
from .grpc.sockets import STATUS, GrpcSocket, GrpcSockets
from .grpc.unauthenticated_traffic import UnauthenticatedTraffic
from .places import FairPlaces, Holder, NoPlace, address_group

Found = TypeVar("Found")

log = logging.getLogger(__name__)

CONNECTIONS_OF_ONE_ADDRESS = 0.5  # in total
RESERVED_DESCRIPTORS = 512  # for workers, files and whatever else the head opens
WANTED_DESCRIPTORS = 1 << 16
QUIET_S, BUSY_S = 0.5, 0.02  # between two scans
BUSY_SHARE = 0.25  # the share of time that scans may take


def raise_descriptor_limit() -> int:
    """Raises the process's descriptor limit as far as allowed, up to `WANTED_DESCRIPTORS`; returns the new
    limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_of_each(wanted: int, num_descriptors: int) -> int:
    """Returns how many connections each of the two servers may hold. gRPC's accepts half as many again until
    the next scan."""
    allowed = max(8, (num_descriptors - RESERVED_DESCRIPTORS) * 2 // 5)
    if allowed < wanted:
        log.warning(
            "limits.max_connections: %d instead of %d, as %d files may be open",
            allowed,
            wanted,
            num_descriptors,
        )
    return min(wanted, allowed)


def places_for(max_connections: int) -> FairPlaces[Holder]:
    """Places for the connections of one server."""
    return FairPlaces(
        "connections", max_connections, max(1, int(max_connections * CONNECTIONS_OF_ONE_ADDRESS))
    )


class GrpcConnections:
    """Keeps a gRPC server's connections within bounds, from `start` to `stop`."""

    def __init__(self, max_connections: int) -> None:
        self.places: FairPlaces[str] = places_for(max_connections)  # by name
        self._ended: set[str] = set()  # connections that were shut down, until they are gone
        self._unauthenticated = UnauthenticatedTraffic()
        self._closing: set[str] = set()  # connections to shut down at the next scan
        self._wake = asyncio.Event()  # there are some
        self._thread = ThreadPoolExecutor(1, "grpc-connections")  # of its own: clients can fill the loop's
        self._task: asyncio.Task[None] | None = None

    @property
    def max_accepted(self) -> int:
        """How many connections the library may accept: more than there are places, so that new ones are
        seen."""
        return self.places.max_places + self.places.max_places // 2

    def add_unauthenticated(self, name: str, now_s: float) -> None:
        """Counts a call without a key. Closes a connection that makes too many, unless it is a proxy's with
        other clients on it too."""
        if self._unauthenticated.add_call(name, now_s) and not self.places.is_in_use(name):
            self.close(name)

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Wraps a call with a key, or any call if no keys are needed: its connection is kept."""
        self._unauthenticated.note_authenticated(name)
        try:
            with self.places.in_use(name):
                yield
        finally:
            self._unauthenticated.note_authenticated(name)

    def close(self, name: str) -> None:
        """Shuts the connection down soon."""
        self._closing.add(name)
        self._wake.set()

    def start(self, port: int) -> None:
        """Starts to watch the connections to `port`. Without /proc only the library's own bound holds."""
        if STATUS.exists():
            self._task = asyncio.get_running_loop().create_task(self._watch(GrpcSockets(port)))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False)

    async def _watch(self, sockets: GrpcSockets) -> None:
        while True:
            work_s, is_busy = 0.0, False
            try:
                work_s, is_busy = await self._keep_bounds(sockets)
            except (
                OSError,
                RuntimeError,
            ) as error:  # out of descriptors or threads: the next scan may find some
                peer_log.warning("listen.grpc: connections cannot be counted: %s", error)
            await asyncio.sleep(work_s / BUSY_SHARE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), BUSY_S if is_busy else QUIET_S)

    async def _keep_bounds(self, sockets: GrpcSockets) -> tuple[float, bool]:
        """Scans the sockets and closes connections that have no place or misuse it. Returns how many seconds
        of work the scan took, and whether the next should follow soon."""
        closing, self._closing = self._closing, set()
        self._wake.clear()
        loop = asyncio.get_running_loop()
        found, work_s = await loop.run_in_executor(self._thread, _timed, sockets.look)
        received = {
            name: connection.received for name, connection in found.items() if connection.received is not None
        }
        verdict = self._unauthenticated.judge(received, self.places.is_in_use, loop.time())
        misused = verdict.too_much | (closing & found.keys())
        losers = self.settle(found)
        ending = losers | {name: found[name] for name in misused | verdict.left}
        if ending:
            await loop.run_in_executor(self._thread, _abort, ending.values())
        if losers:
            peer_log.warning(
                "listen.grpc: %d connections without a call lost their places to newcomers", len(losers)
            )
        if misused:
            peer_log.warning(
                "listen.grpc: %d connections closed for too many headers, or too much without a key",
                len(misused),
            )
        is_busy = (
            sockets.num_reset > 0
            or verdict.is_suspicious
            or len(self.places) >= self.places.max_places * 3 // 4
        )
        return work_s, is_busy

    def settle(self, found: dict[str, Found]) -> dict[str, Found]:
        """Assigns a place to each connection in `found`, keyed by name; returns those that got none."""
        for name in [name for name in self.places.holders() if name not in found]:
            self.places.leave(name)
        self._ended &= found.keys()  # the library may still hold those that were shut down
        losers: dict[str, Found] = {}
        for name in [name for name in found if name not in self.places and name not in self._ended]:
            try:
                evicted = self.places.take(address_group(name.partition(" ")[0]), name)
            except NoPlace:
                evicted = name
            if evicted is not None:
                losers[evicted] = found[evicted]
        self._ended |= losers.keys()
        return losers


def _timed(look: Callable[[], Found]) -> tuple[Found, float]:
    """Returns the result of `look`, and the processor time in seconds that it took this thread."""
    began_s = time.thread_time()
    return look(), time.thread_time() - began_s


def _abort(connections: Iterable[GrpcSocket]) -> None:
    for connection in connections:
        connection.abort()
