"""The head's `Keeper` over Ray."""

import asyncio
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError

from ..core.config import ClusterConfig
from ..head.ports import Key, Outcome, Version
from ..router.cores import Placement
from ..worker.spec import WorkerSpec
from .actors import reason_of

RETRY_S = 0.5  # where the keeper cannot be reached


class RayKeeper:
    """Calls `KeeperActor` through its handle. A single call waits for the ends of all workers: a keeper holds
    as many for a large fleet, and after many heads, as for a small one. Calls may overtake
    each other."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._starts: dict[Key, Any] = {}  # calls of `start`, until `ended` has seen them through
        self._outcomes: dict[Key, asyncio.Future[Outcome]] = {}
        self._polling: asyncio.Task[None] | None = None

    def start(self, spec: WorkerSpec, placement: Placement) -> None:
        self._starts[spec.key] = self._actor.start.remote(spec, placement)

    async def ended(self, key: Key) -> Outcome:
        started = self._starts.pop(key, None)
        if started is not None:
            try:
                await started
            except RayError as error:
                return Outcome(reason_of(error))
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        outcome = await asyncio.shield(self._outcome(key))
        del self._outcomes[key]
        return outcome

    def _outcome(self, key: Key) -> "asyncio.Future[Outcome]":
        return self._outcomes.setdefault(key, asyncio.get_running_loop().create_future())

    async def _poll(self) -> None:
        num_known = 0
        while True:
            try:
                num_known, endings = await self._actor.endings.remote(num_known)
            except ActorUnavailableError:  # for a moment
                await asyncio.sleep(RETRY_S)
                continue
            except RayError as error:  # the keeper is gone, and all workers with it
                for future in self._outcomes.values():
                    if not future.done():
                        future.set_result(Outcome(reason_of(error)))
                return
            for key, outcome in endings:
                if not self._outcome(key).done():
                    self._outcome(key).set_result(outcome)

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
