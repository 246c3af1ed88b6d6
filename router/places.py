"""Assigns instances to places on hosts and queues those that wait. In: hosts that join, leave or fail. Out:
placements.

An instance that has a place keeps it: a host that joins moves nothing that is running.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import CapacityError
from ..core.messages import Role
from ..core.needs import Need
from .cores import CoreAllocator, Key, Placement


@dataclass(frozen=True, slots=True)
class _Instance:
    role: Role
    need: Need


class Places:
    """Counts the resources that instances use on each host, and decides which instance is next when there is
    room."""

    def __init__(self, cores: CoreAllocator | None = None) -> None:
        self.cores = cores or CoreAllocator()
        self.wanted: Mapping[Role, int] = {}  # instances, as configured
        self._waiting: dict[Key, _Instance] = {}  # oldest first
        self._placed: dict[Key, _Instance] = {}

    def ask(self, worker: Key, role: Role, need: Need) -> None:
        """Queues an instance for a place; `next` gives it one."""
        self._waiting[worker] = _Instance(role, need)

    def adopt(self, worker: Key, role: Role, placement: Placement, need: Need) -> None:
        """Registers an instance that an earlier head has placed."""
        self.cores.take_back(worker, placement, need)
        self._placed[worker] = _Instance(role, need)

    def assign(self, worker_id: str, role: Role) -> None:
        """Moves an instance to another pool."""
        for worker, instance in self._placed.items():
            if worker[0] == worker_id:
                self._placed[worker] = _Instance(role, instance.need)

    def give_back(self, worker: Key) -> None:
        """Releases an instance that has ended, or that no longer waits; unknown ones are ignored."""
        self._waiting.pop(worker, None)
        self._placed.pop(worker, None)
        self.cores.give_back(worker)

    @property
    def waiting(self) -> tuple[Key, ...]:
        return tuple(self._waiting)

    def next(self) -> tuple[Key, Placement] | None:
        """Returns the instance that gets a place now, and the place; None when none can.

        The pool with the smallest placed fraction comes first, so that the first prefill and the first decode
        instance precede all others and pools grow by their ratio; among equals, the larger instance, as it
        fits in fewer places."""
        num_placed = Counter(instance.role for instance in self._placed.values())
        order = sorted(self._waiting.items(), key=lambda item: self._rank(item[1], num_placed))
        for worker, instance in order:
            try:
                placement = self.cores.take(worker, instance.need)
            except CapacityError:
                continue
            self._placed[worker] = self._waiting.pop(worker)
            return worker, placement
        return None

    def _rank(self, instance: _Instance, num_placed: Mapping[Role, int]) -> tuple[float, float]:
        part = num_placed.get(instance.role, 0) / max(1, self.wanted.get(instance.role, 0))
        return part, -instance.need.num_cores * instance.need.core_share

    def why_waiting(self, worker: Key) -> str:
        """Describes why an instance waits, after `next` found no room for it."""
        return self.cores.what_is_missing(worker[0], self._waiting[worker].need) or ""
