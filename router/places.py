"""Who gets a place on which host, and who waits for one: hosts that join, leave or fail in, placements out.

An instance that has a place keeps it: nothing that runs is moved because a host joins.
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
    """Counts what instances have of each host, and decides who comes next when there is room."""

    def __init__(self, cores: CoreAllocator | None = None) -> None:
        self.cores = cores or CoreAllocator()
        self.wanted: Mapping[Role, int] = {}  # instances, as configured
        self._waiting: dict[Key, _Instance] = {}  # oldest first
        self._placed: dict[Key, _Instance] = {}

    def ask(self, worker: Key, role: Role, need: Need) -> None:
        """The instance waits for a place from now on; `next` gives it one."""
        self._waiting[worker] = _Instance(role, need)

    def adopt(self, worker: Key, role: Role, placement: Placement, need: Need) -> None:
        """An earlier head has placed it."""
        self.cores.take_back(worker, placement, need)
        self._placed[worker] = _Instance(role, need)

    def assign(self, worker_id: str, role: Role) -> None:
        """The instance serves in another pool now."""
        for worker, instance in self._placed.items():
            if worker[0] == worker_id:
                self._placed[worker] = _Instance(role, instance.need)

    def give_back(self, worker: Key) -> None:
        """Nothing is left of the instance, or it does not wait any more; unknown ones are ignored."""
        self._waiting.pop(worker, None)
        self._placed.pop(worker, None)
        self.cores.give_back(worker)

    @property
    def waiting(self) -> tuple[Key, ...]:
        return tuple(self._waiting)

    def next(self) -> tuple[Key, Placement] | None:
        """Who gets a place now; None when nobody can.

        First comes the pool of which the least part is placed, so that the first prefill and the first decode
        instance come before all others and pools grow by their ratio; of equal ones the larger instance, as
        it fits in fewer places."""
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
        """In words, after `next` found no room for it."""
        return self.cores.what_is_missing(worker[0], self._waiting[worker].need) or ""
