"""The connections of a server: how many it may hold, from whom, and which one ends for a newcomer.

`FairPlaces` decides. HTTP asks it when it accepts a connection. gRPC's library accepts by itself and has one bound for all
peers, so `GrpcConnections` looks, when there are many, at the process's own descriptors and shuts down what has lost its place.
"""

import asyncio
import ipaddress
import logging
import os
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..core.peer_log import peer_log
from .places import FairPlaces, Holder, NoPlace, address_group
from .unpaid_calls import UnpaidCalls

log = logging.getLogger(__name__)

CONNECTIONS_OF_ONE_ADDRESS = 0.5  # of all
RESERVED_DESCRIPTORS = 512  # for workers, files and whatever else the head opens
WANTED_DESCRIPTORS = 1 << 16
DESCRIPTORS = "/proc/self/fd"
QUIET_S, BUSY_S = 0.5, 0.05  # between two looks
BUSY_SHARE = 0.25  # of the time may go into looking


def raise_descriptor_limit() -> int:
    """As many descriptors as this process may have, up to `WANTED_DESCRIPTORS`; returns how many these are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_of_each(wanted: int, num_descriptors: int) -> int:
    """How many connections each of the two servers may hold. gRPC's has room for half as many again, until it has looked."""
    allowed = max(8, (num_descriptors - RESERVED_DESCRIPTORS) * 2 // 5)
    if allowed < wanted:
        log.warning("limits.max_connections: %d instead of %d, as %d files may be open", allowed, wanted, num_descriptors)
    return min(wanted, allowed)


def places_for(max_connections: int) -> FairPlaces[Holder]:
    """Places for the connections of one server."""
    return FairPlaces("connections", max_connections, max(1, int(max_connections * CONNECTIONS_OF_ONE_ADDRESS)))


def connection_name(host: str, port: int | str) -> str:
    """The same for one connection, however its peer's address is written."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        host = str(mapped or address)
    return f"{host} {port}"


class GrpcConnections:
    """Keeps a gRPC server's connections within bounds, from `start` to `stop`."""

    def __init__(self, max_connections: int) -> None:
        self.places: FairPlaces[str] = places_for(max_connections)  # by their names
        self._names: dict[str, str | None] = {}  # of sockets as /proc calls them; None: not one of the server's
        self._ended: set[str] = set()  # connections that were shut down, until they are gone
        self._unpaid = UnpaidCalls()
        self._closing: set[str] = set()  # connections to shut down at the next look
        self._wake = asyncio.Event()  # there are some
        self._thread = ThreadPoolExecutor(1, "grpc-connections")  # of its own: clients can fill the loop's
        self._task: asyncio.Task[None] | None = None

    @property
    def max_accepted(self) -> int:
        """How many the library may accept: some more than there are places, so that newcomers are seen."""
        return self.places.max_places + self.places.max_places // 2

    def add_unpaid(self, name: str, now_s: float) -> None:
        """Count a call without a key. A connection that makes too many is closed, unless a proxy has others on it too."""
        if self._unpaid.add(name, now_s) and not self.places.is_in_use(name):
            self.close(name)

    def close(self, name: str) -> None:
        """Shut the connection down, soon."""
        self._closing.add(name)
        self._wake.set()

    def start(self, port: int) -> None:
        """Watch the connections to `port`. Without /proc only the library's own bound holds."""
        if os.path.isdir(DESCRIPTORS):
            self._task = asyncio.get_running_loop().create_task(self._watch(port))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False)

    async def _watch(self, port: int) -> None:
        while True:
            began_s = time.monotonic()
            try:
                is_full = await self._keep_bounds(port)
            except (OSError, RuntimeError) as error:  # out of descriptors or threads: the next look may find some
                peer_log.warning("listen.grpc: connections cannot be counted: %s", error)
                is_full = False
            pause_s = (time.monotonic() - began_s) / BUSY_SHARE
            await asyncio.sleep(pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), BUSY_S if is_full else QUIET_S)

    async def _keep_bounds(self, port: int) -> bool:
        """Look, if there may be many, and shut down those that have no place. Whether places are short."""
        closing, self._closing = self._closing, set()
        self._wake.clear()
        if not closing and len(os.listdir(DESCRIPTORS)) <= self.places.max_places // 2:
            self._names.clear()
            self._ended.clear()  # a name may come back
            return False
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._look, port)
        misused = {name: found[name] for name in closing if name in found}
        losers = self.settle(found)
        if misused or losers:
            await loop.run_in_executor(self._thread, _shut_down, losers | misused)
        if losers:
            peer_log.warning("listen.grpc: %d connections without a call lost their places to newcomers", len(losers))
        if misused:
            peer_log.warning("listen.grpc: %d connections closed for too many headers or calls without a key", len(misused))
        return len(self.places) >= self.places.max_places * 3 // 4

    def settle(self, found: dict[str, int]) -> dict[str, int]:
        """Give each connection of `found` (its name and descriptor) a place; returns those that have none."""
        for name in [name for name in self.places.holders() if name not in found]:
            self.places.leave(name)
        self._ended &= found.keys()  # the library may still hold those that were shut down
        losers: dict[str, int] = {}
        for name in [name for name in found if name not in self.places and name not in self._ended]:
            try:
                evicted = self.places.take(address_group(name.partition(" ")[0]), name)
            except NoPlace:
                evicted = name
            if evicted is not None:
                losers[evicted] = found[evicted]
        self._ended |= losers.keys()
        return losers

    def _look(self, port: int) -> dict[str, int]:
        """The descriptors of the connections that there are, by their names. On a thread."""
        found, names = dict[str, int](), dict[str, str | None]()
        for entry in os.listdir(DESCRIPTORS):
            with suppress(OSError):  # closed meanwhile
                link = os.readlink(f"{DESCRIPTORS}/{entry}")
                if not link.startswith("socket:"):
                    continue
                name = names[link] = self._names[link] if link in self._names else _name_of(int(entry), port)
                if name is not None:
                    found[name] = int(entry)
        self._names = names
        return found


def _name_of(descriptor: int, port: int) -> str | None:
    """The connection that a socket is, if it is one to `port`."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.getsockname()[1] != port:
            return None
        try:
            host, peer_port = sock.getpeername()[:2]
        except OSError:  # it listens, or its peer has gone
            return None
        return connection_name(host, peer_port)


def _shut_down(connections: dict[str, int]) -> None:
    """End connections under the library that owns them, which sees its peers hang up. On a thread."""
    for name, descriptor in connections.items():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:  # OSError: it has ended
            if connection_name(*sock.getpeername()[:2]) == name:  # else the descriptor is another's by now
                sock.shutdown(socket.SHUT_RDWR)
