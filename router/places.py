"""Assigns instances to places on hosts and queues those that wait. In: hosts that join, leave or fail. Out:
placements.

An instance that has a place keeps it: a host that joins moves nothing that is running.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

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
        self._waiting: dict[Key, _Instance] = {}
        # instances that are alike, oldest first, with the number of their request
        self._alike: dict[_Instance, dict[Key, int]] = {}
        self._numbers = count()
        self._placed: dict[Key, _Instance] = {}
        self._num_placed: Counter[Role] = Counter()

    def ask(self, worker: Key, role: Role, need: Need) -> None:
        """Queues an instance for a place; `next` gives it one."""
        instance = self._waiting[worker] = _Instance(role, need)
        self._alike.setdefault(instance, {})[worker] = next(self._numbers)

    def adopt(self, worker: Key, role: Role, placement: Placement, need: Need) -> None:
        """Registers an instance that an earlier head has placed."""
        self.cores.take_back(worker, placement, need)
        self._place(worker, _Instance(role, need))

    def assign(self, worker_id: str, role: Role) -> None:
        """Moves an instance to another pool."""
        for worker, instance in self._placed.items():
            if worker[0] == worker_id:
                self._num_placed[instance.role] -= 1
                self._place(worker, _Instance(role, instance.need))

    def give_back(self, worker: Key) -> None:
        """Releases an instance that has ended, or that no longer waits; unknown ones are ignored."""
        if worker in self._waiting:
            self._stop_waiting(worker)
        if (placed := self._placed.pop(worker, None)) is not None:
            self._num_placed[placed.role] -= 1
        self.cores.give_back(worker)

    def _place(self, worker: Key, instance: _Instance) -> None:
        self._placed[worker] = instance
        self._num_placed[instance.role] += 1

    def _stop_waiting(self, worker: Key) -> _Instance:
        instance = self._waiting.pop(worker)
        del self._alike[instance][worker]
        if not self._alike[instance]:
            del self._alike[instance]
        return instance

    def next(self) -> tuple[Key, Placement] | None:
        """Returns the instance that gets a place now, and the place; None when none can.

        The pool with the smallest placed fraction comes first, so that the first prefill and the first decode
        instance precede all others and pools grow by their ratio; among equals, the larger instance, as it
        fits in fewer places."""
        first = {instance: next(iter(alike.items())) for instance, alike in self._alike.items()}
        for instance in sorted(first, key=lambda one: (self._rank(one, self._num_placed), first[one][1])):
            worker = first[instance][0]
            placement = self.cores.take(worker, instance.need)
            if placement is not None:
                self._place(worker, self._stop_waiting(worker))
                return worker, placement
        return None

    def _rank(self, instance: _Instance, num_placed: Mapping[Role, int]) -> tuple[float, float]:
        part = num_placed.get(instance.role, 0) / max(1, self.wanted.get(instance.role, 0))
        return part, -instance.need.num_cores * instance.need.core_share

    def why_waiting(self, worker: Key) -> str:
        """Describes why an instance waits; empty when there is room."""
        return self.cores.what_is_missing(worker[0], self._waiting[worker].need) or ""
