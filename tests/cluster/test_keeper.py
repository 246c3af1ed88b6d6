"""The keeper's calls, which may overtake each other on their way."""

import asyncio
from types import SimpleNamespace
from typing import Any

from pdserve.cluster.actors import Outcome
from pdserve.cluster.cores import Placement
from pdserve.cluster.keeper import RayKeeper

SPEC: Any = SimpleNamespace(key=("decode-0", 1))


class OvertakingActor:
    """A handle whose calls arrive in the opposite order: the last first, once the caller waits."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, asyncio.Future[Outcome]]] = []
        self.arrived: list[str] = []

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: self._call(method))

    def _call(self, method: str) -> "asyncio.Future[Outcome]":
        loop = asyncio.get_running_loop()
        self._calls.append((method, loop.create_future()))
        loop.call_soon(self._arrive)
        return self._calls[-1][1]

    def _arrive(self) -> None:
        method, result = self._calls.pop()
        self.arrived.append(method)
        if method == "start" or "start" in self.arrived:
            result.set_result(Outcome("the process ended"))
        else:
            result.set_exception(KeyError("not started"))


async def test_the_end_of_a_worker_is_not_asked_for_before_it_was_started() -> None:
    actor = OvertakingActor()
    keeper = RayKeeper(actor)
    keeper.start(SPEC, Placement("node", (0,)))
    assert (await keeper.ended(SPEC.key)).reason == "the process ended"


async def test_the_end_of_a_worker_that_another_head_started_is_asked_for() -> None:
    actor = OvertakingActor()
    actor.arrived.append("start")
    assert (await RayKeeper(actor).ended(SPEC.key)).reason == "the process ended"
