"""Faults, drawn by seed: rates of faults of messages, chunks and steps, and a plan of accidents."""

import enum
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any


class MessageFault(enum.Enum):
    """A network fault of one message."""

    LOSE = "message lost"
    DUPLICATE = "message duplicated"
    OVERTAKE = "message overtaken"


class Accident(enum.Enum):
    """A one-off event that hits a process, a connection, or the cluster."""

    KILL = "worker killed"
    FREEZE = "worker frozen"
    SLOW = "worker slow"
    HANG = "worker hung in a step"
    CRASH = "worker's engine crashed"
    PARTITION_ROUTER = "worker cut off from the router"
    PARTITION_WORKERS = "two workers cut off from each other"
    CUT = "connections of a worker reset"
    CUT_TRANSFERS = "transfer connections of a worker reset"  # not the router's, so that no worker dies
    DRAIN = "worker drained"
    SCALE = "pools resized"
    HOST_DOWN = "host down"
    HOST_CUT = "host cut off from the router"
    HOSTS_PARTED = "two hosts cut off from each other"
    HOST_REMOVED = "host taken out of the file"
    ROUTER_FREEZE = "router frozen"
    ROUTER_RESTART = "router restarted"


ORDERLY = (Accident.DRAIN, Accident.SCALE, Accident.HOST_REMOVED)  # nothing may fail for these
OF_HOSTS = (Accident.HOST_DOWN, Accident.HOST_CUT, Accident.HOSTS_PARTED, Accident.HOST_REMOVED)
OF_ENGINES = (Accident.HANG, Accident.CRASH)
OF_THE_ROUTER = (Accident.ROUTER_RESTART, Accident.ROUTER_FREEZE)  # workers continue


@dataclass(frozen=True)
class FaultRates:
    """Probabilities per message, chunk or request, and accidents per second."""

    lose: float = 0.0
    duplicate: float = 0.0
    overtake: float = 0.0
    corrupt: float = 0.0
    fail_store: float = 0.0
    accidents_per_s: float = 0.0
    latency_s: float = 0.0002
    jitter: float = 1.0  # of the latency; larger ones now and then
    max_half_open_s: float = 2.0  # how much later than the network allows a broken connection is noticed


class Faults:
    """Draws faults until `calm`, and counts them by kind."""

    def __init__(self, rng: Random, rates: FaultRates) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._rates = rates
        self._is_calm = False

    def calm(self) -> None:
        """Stops all further faults."""
        self._is_calm = True

    def latency_s(self) -> float:
        """Draws the latency of one message: usually short, occasionally a hundred times as long."""
        rates, draw = self._rates, self._rng.random()
        latency_s = rates.latency_s * (0.5 + rates.jitter * draw)
        return latency_s * 100 if draw < 0.002 and not self._is_calm else latency_s

    def half_open_s(self) -> float:
        """Draws how much later than the network allows one side of a broken connection notices."""
        return min(self._rng.choice((0.0, 0.0, 0.1, 2.0)), self._rates.max_half_open_s)

    def are_last_words_lost(self) -> bool:
        return self._rng.random() < 0.5

    def of_message(self, message: Any) -> MessageFault | None:
        if self._is_calm:
            return None
        draw = self._rng.random()
        for fault, rate in (
            (MessageFault.LOSE, self._rates.lose),
            (MessageFault.DUPLICATE, self._rates.duplicate),
            (MessageFault.OVERTAKE, self._rates.overtake),
        ):
            if draw < rate:
                self.counts[fault.value] += 1
                return fault
            draw -= rate
        return None

    def corrupts_chunk(self) -> bool:
        corrupts = not self._is_calm and self._rng.random() < self._rates.corrupt
        if corrupts:
            self.counts["chunk corrupted"] += 1
        return corrupts

    def loses_chunk(self) -> bool:
        loses = not self._is_calm and self._rng.random() < self._rates.corrupt
        if loses:
            self.counts["chunk lost"] += 1
        return loses

    def fails_store(self) -> bool:
        fails = not self._is_calm and self._rng.random() < self._rates.fail_store
        if fails:
            self.counts["block store failed"] += 1
        return fails

    def breaks_link(self) -> bool:
        breaks = not self._is_calm and self._rng.random() < self._rates.fail_store
        if breaks:
            self.counts["link broken under a chunk"] += 1
        return breaks

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
