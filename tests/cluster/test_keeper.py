"""The keeper's calls, which may overtake each other on their way."""

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from pdserve.cluster.actors import KeeperActor
from pdserve.cluster.keeper import RayKeeper
from pdserve.core.config import ClusterConfig
from pdserve.head import head as head_module
from pdserve.head.head import Head
from pdserve.head.ports import Outcome
from pdserve.head.spec import HeadSpec
from pdserve.router.cores import Placement

SPEC: Any = SimpleNamespace(key=("decode-0", 1))
NO_NODES: Any = SimpleNamespace()  # not used


class OvertakingActor:
    """A handle whose calls arrive in reverse order, once the caller waits."""

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


async def test_a_workers_end_is_not_awaited_before_its_start() -> None:
    actor = OvertakingActor()
    keeper = RayKeeper(actor)
    keeper.start(SPEC, Placement("node", (0,)))
    assert (await keeper.ended(SPEC.key)).reason == "the process ended"


async def test_the_end_of_another_heads_worker_is_awaited() -> None:
    actor = OvertakingActor()
    actor.arrived.append("start")
    assert (await RayKeeper(actor).ended(SPEC.key)).reason == "the process ended"


def config_of(num_decode: int) -> ClusterConfig:
    return ClusterConfig.model_validate({"pools": {"decode": {"instances": num_decode}}})


def head_of(generation: int, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> Head:
    """Returns a head of which only `apply` can be called; `calls` collects those in flight to its keeper."""
    monkeypatch.setattr(
        head_module,
        "plan",
        lambda config, nodes, more_may_come: SimpleNamespace(check=lambda more_may_come: None),
    )
    remember = SimpleNamespace(remote=lambda *arguments: calls.append(arguments))
    keeper = RayKeeper(SimpleNamespace(remember=remember))
    head = Head(
        HeadSpec(token="secret", host="127.0.0.1", generation=generation), keeper, NO_NODES, "127.0.0.1"
    )
    router = SimpleNamespace(configure=lambda config: None, status=lambda now_s: SimpleNamespace(workers=()))
    head._device = "cpu"
    head._watch = SimpleNamespace(  # type: ignore[assignment]
        resolve=AsyncMock(),
        are_complete=lambda config: True,
        nodes=lambda config: (),
        expect=lambda config: None,
    )
    head._service = SimpleNamespace(router=router)  # type: ignore[assignment]
    head._controller = SimpleNamespace(handle=lambda event: None)  # type: ignore[assignment]
    head._telemetry = SimpleNamespace(configure=lambda config: None)  # type: ignore[assignment]
    return head


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_the_last_applied_configuration_is_kept_despite_overtaking_calls(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    head = head_of(0, calls, monkeypatch)
    await head.apply(config_of(2), dry_run=False)
    await head.apply(config_of(3), dry_run=False)
    await head_of(1, calls, monkeypatch).apply(config_of(4), dry_run=False)
    # made by ray.remote
    keeper = KeeperActor.__ray_metadata__.modified_class(config_of(1))  # type: ignore[attr-defined]
    for number in order:
        await keeper.remember(*calls[number])
    assert (await keeper.config()).pools.decode.instances == 4
