"""The keeper as the controller sees it: who holds the workers' processes, which outlive the head."""

from typing import Any, Protocol

from ..router.cores import Placement
from .actors import Outcome
from ..worker.spec import WorkerSpec

Key = tuple[str, int]  # (worker_id, incarnation)


class Keeper(Protocol):
    def start(self, spec: WorkerSpec, placement: Placement) -> None: ...
    async def ended(self, key: Key) -> Outcome: ...
    def stop(self, key: Key) -> None: ...
    def kill(self, key: Key) -> None: ...


class RayKeeper:
    """`KeeperActor`, by its handle. Calls of an async actor may overtake each other: one starts a worker and tells its end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._started: dict[Key, Any] = {}  # calls of `start`, until `ended` waits for them

    def start(self, spec: WorkerSpec, placement: Placement) -> None:
        self._started[spec.key] = self._actor.start.remote(spec, placement)

    async def ended(self, key: Key) -> Outcome:
        started = self._started.pop(key, None)
        outcome: Outcome = await (self._actor.ended.remote(key) if started is None else started)
        return outcome

    def stop(self, key: Key) -> None:
        self._actor.stop.remote(key)

    def kill(self, key: Key) -> None:
        self._actor.kill.remote(key)
