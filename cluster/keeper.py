"""The head's `Keeper` over Ray."""

from typing import Any

from ray.exceptions import RayError

from ..core.config import ClusterConfig
from ..head.ports import Key, Outcome, Version
from ..router.cores import Placement
from ..worker.spec import WorkerSpec
from .actors import reason_of


class RayKeeper:
    """Calls `KeeperActor` through its handle. Calls of an async actor may overtake each other: so a single
    call starts a worker and reports its end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._started: dict[Key, Any] = {}  # calls of `start`, until `ended` waits for them

    def start(self, spec: WorkerSpec, placement: Placement) -> None:
        self._started[spec.key] = self._actor.start.remote(spec, placement)

    async def ended(self, key: Key) -> Outcome:
        started = self._started.pop(key, None)
        try:
            outcome: Outcome = await (self._actor.ended.remote(key) if started is None else started)
        except RayError as error:  # the keeper is gone, and all workers with it
            return Outcome(reason_of(error))
        return outcome

    def stop(self, key: Key) -> None:
        self._actor.stop.remote(key)

    def kill(self, key: Key) -> None:
        self._actor.kill.remote(key)

    async def living(self) -> list[tuple[WorkerSpec, Placement]]:
        living: list[tuple[WorkerSpec, Placement]] = await self._actor.living.remote()
        return living

    async def config(self) -> ClusterConfig:
        config: ClusterConfig = await self._actor.config.remote()
        return config

    def remember(self, config: ClusterConfig, version: Version) -> None:
        self._actor.remember.remote(config, version)
