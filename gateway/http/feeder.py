"""Feeds received HTTP data to the connections' parsers, a little in each turn of the loop.

A parser takes some 10 microseconds for each header and each chunk, and one read may hold tens of thousands of
them. All connections of a server share one turn's budget, those of one address after those of the other, and
short request heads come before chunks and long heads."""

import asyncio
from typing import Protocol

from ..turns import Turns

TURN_BYTES = 4096  # of possibly expensive input, in one turn of the loop


class Fed(Protocol):
    """A connection with pending bytes."""

    @property
    def group(self) -> str:
        """The group of addresses that it comes from."""
        ...

    def feed(self) -> int:
        """Feeds one slice; returns its cost in bytes. May close the connection."""
        ...

    @property
    def wants_feeding(self) -> bool:
        """Whether there are bytes that may be fed now."""
        ...

    @property
    def is_urgent(self) -> bool:
        """Whether its next slice precedes those of connections without priority."""
        ...


class Feeder:
    """Used on one asyncio loop."""

    def __init__(self) -> None:
        self._left = TURN_BYTES
        self._urgent: Turns[Fed] = Turns()
        self._others: Turns[Fed] = Turns()
        self._waiting: set[Fed] = set()  # those in either queue
        self._turn: asyncio.Handle | None = None

    def run(self, connection: Fed) -> None:
        """Feeds `connection`: at once, as far as this turn's budget allows and none has waited longer, and
        the rest in later turns."""
        if not self._waiting:
            while connection.wants_feeding and self._left > 0:
                self._feed(connection)
        if connection.wants_feeding and connection not in self._waiting:
            self._enqueue(connection)

    def _enqueue(self, connection: Fed) -> None:
        self._waiting.add(connection)
        (self._urgent if connection.is_urgent else self._others).add(connection.group, connection)

    def _feed(self, connection: Fed) -> None:
        self._left -= connection.feed()
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn, self._left = None, TURN_BYTES
        while self._left > 0 and (queue := self._urgent or self._others):
            connection = queue.next()
            self._waiting.discard(connection)
            if connection.wants_feeding:
                self._feed(connection)
            if connection.wants_feeding:
                self._enqueue(connection)
        if self._waiting and self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)
