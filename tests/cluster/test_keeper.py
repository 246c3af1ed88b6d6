"""The keeper's calls, which may overtake each other on their way."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from pdserve.cluster import actors, keeper as keeper_module
from pdserve.cluster.actors import KeeperActor
from pdserve.cluster.keeper import RayKeeper
from pdserve.core.config import ClusterConfig
from pdserve.head import head as head_module
from pdserve.head.head import Head
from pdserve.head.ports import Key, Outcome
from pdserve.head.spec import HeadSpec
from pdserve.router.cores import Placement
from pdserve.worker.spec import WorkerSpec

PLACEMENT = Placement("node", (0,))
UNAVAILABLE = ActorUnavailableError("the socket was closed", None)
NO_NODES: Any = SimpleNamespace()  # not used


class FakeWorkers:
    """Stands in for `WorkerActor`: processes end when a test says so."""

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Future[None]] = {}
        self.is_host_up = True

    def options(self, **_: Any) -> "FakeWorkers":
        return self

    def remote(self, spec: WorkerSpec) -> SimpleNamespace:
        name = f"{spec.worker_id}.{spec.rank}" if spec.rank else spec.worker_id
        future = self.ends[name] = asyncio.get_running_loop().create_future()
        return SimpleNamespace(run=SimpleNamespace(remote=lambda: future), end=future)

    def kill(self, actor: Any) -> None:
        if not actor.end.done():
            actor.end.set_exception(ActorDiedError())


class Handle:
    """A handle of a real keeper, without Ray between. The newest call arrives first."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self.num_open = 0

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self._call(getattr(self._keeper, method), arguments))

    def _call(self, method: Any, arguments: tuple[Any, ...]) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        self._waiting.append((lambda: method(*arguments), loop.create_future()))
        loop.call_soon(lambda: loop.create_task(self._arrive()))
        return self._waiting[-1][1]

    async def _arrive(self) -> None:
        method, result = self._waiting.pop()
        self.num_open += 1
        try:
            result.set_result(await method())
        except RayError as error:
            result.set_exception(error)
        finally:
            self.num_open -= 1


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    workers = FakeWorkers()
    monkeypatch.setattr(actors, "WorkerActor", workers)
    monkeypatch.setattr(actors, "options_of", lambda spec, placement: {})
    monkeypatch.setattr(ray, "kill", workers.kill)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": PLACEMENT.node_id, "Alive": workers.is_host_up}])
    monkeypatch.setattr(actors, "POLL_S", 0.001)
    return workers


def keeper_actor() -> Any:
    # made by ray.remote
    return KeeperActor.__ray_metadata__.modified_class(config_of(1))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Spec:
    """The part of a `WorkerSpec` that the keeper looks at."""

    worker_id: str
    num_ranks: int = 1
    rank: int = 0

    def of_rank(self, rank: int, cores: tuple[int, ...]) -> "Spec":
        return replace(self, rank=rank)

    @property
    def key(self) -> Key:
        return self.worker_id, 1


def spec_of(number: int, num_ranks: int = 1) -> Any:
    return Spec(f"decode-{number}", num_ranks)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


async def test_a_workers_end_reaches_the_head_that_started_it(workers: FakeWorkers) -> None:
    keeper = RayKeeper(Handle(keeper_actor()))
    ends = []
    for number in range(3):
        keeper.start(spec_of(number), PLACEMENT)
        ends.append(asyncio.create_task(keeper.ended(spec_of(number).key)))
    await until(lambda: len(workers.ends) == 3)
    workers.ends["decode-1"].set_result(None)
    assert await ends[1] == Outcome("the process ended")
    workers.ends["decode-0"].set_exception(RayError("lost"))
    assert await ends[0] == Outcome("lost", has_died=True)
    assert not ends[2].done()


@pytest.mark.parametrize(
    ("error", "is_host_up", "has_died"),
    [(ActorDiedError(), True, True), (ActorDiedError(), False, False), (UNAVAILABLE, True, False)],
)
async def test_a_process_that_may_have_ended_with_its_host_has_not_died_by_itself(
    error: RayError, is_host_up: bool, has_died: bool, workers: FakeWorkers
) -> None:
    keeper = RayKeeper(Handle(keeper_actor()))
    keeper.start(spec_of(0), PLACEMENT)
    end = asyncio.create_task(keeper.ended(spec_of(0).key))
    await until(lambda: bool(workers.ends))
    workers.is_host_up = is_host_up
    workers.ends["decode-0"].set_exception(error)
    assert (await end).has_died is has_died


async def test_all_ranks_end_with_any_of_them(workers: FakeWorkers) -> None:
    for number, dead in enumerate(("decode-0", "decode-1.1", "decode-2.3")):
        keeper = RayKeeper(Handle(keeper_actor()))
        keeper.start(spec_of(number, 4), PLACEMENT)
        end = asyncio.create_task(keeper.ended(spec_of(number).key))
        await until(lambda number=number: f"decode-{number}.3" in workers.ends)  # type: ignore[misc]
        workers.ends[dead].set_exception(ActorDiedError())
        outcome = await end
        assert outcome.has_died
        assert outcome.reason.startswith(f"rank {dead[-1]}: ") == ("." in dead)
    assert len(workers.ends) == 12
    assert all(one.done() for one in workers.ends.values())


async def test_a_killed_worker_is_over_when_its_last_rank_is(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    actor = keeper_actor()
    keeper = RayKeeper(Handle(actor))
    keeper.start(spec_of(0, 2), PLACEMENT)
    end = asyncio.create_task(keeper.ended(spec_of(0).key))
    await until(lambda: len(workers.ends) == 2)
    await actor.kill(spec_of(0).key)
    first, last = killed
    workers.kill(first)
    await until(lambda: len(killed) == 4)  # once more, all of them
    assert not end.done()
    workers.kill(last)
    assert (await end).has_died


async def test_ranks_that_leave_in_order_are_no_end_of_the_worker(workers: FakeWorkers) -> None:
    keeper = RayKeeper(Handle(keeper_actor()))
    keeper.start(spec_of(0, 2), PLACEMENT)
    end = asyncio.create_task(keeper.ended(spec_of(0).key))
    await until(lambda: len(workers.ends) == 2)
    workers.ends["decode-0.1"].set_result(None)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not end.done()
    workers.ends["decode-0"].set_result(None)
    assert await end == Outcome("the process ended")


async def test_an_end_is_reported_when_ray_does_not_list_its_hosts(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", Mock(side_effect=ConnectionError("Ray's head is busy")))
    keeper = RayKeeper(Handle(keeper_actor()))
    keeper.start(spec_of(0), PLACEMENT)
    end = asyncio.create_task(keeper.ended(spec_of(0).key))
    await until(lambda: bool(workers.ends))
    workers.ends["decode-0"].set_exception(RayError("lost"))
    assert await end == Outcome("lost", has_died=False)


async def test_an_end_is_not_lost_on_a_head_that_asks_late(workers: FakeWorkers) -> None:
    actor = keeper_actor()
    first = RayKeeper(Handle(actor))
    for number in range(2):
        first.start(spec_of(number), PLACEMENT)
    await until(lambda: len(workers.ends) == 2)
    second = RayKeeper(Handle(actor))
    assert {spec.key for spec, _ in await second.living()} == {("decode-0", 1), ("decode-1", 1)}
    for end in workers.ends.values():
        end.set_result(None)
    assert await second.ended(("decode-0", 1)) == Outcome("the process ended")
    assert await second.ended(("decode-1", 1)) == Outcome("the process ended")
    assert await second.living() == []


async def test_the_keepers_open_calls_do_not_accumulate(
    workers: FakeWorkers,
) -> None:
    handle = Handle(keeper_actor())
    for number in range(50):
        await handle.start.remote(spec_of(number), PLACEMENT)
    for _ in range(5):
        head = RayKeeper(handle)
        ends = [asyncio.create_task(head.ended(spec_of(number).key)) for number in range(50)]
        await until(lambda: handle.num_open == 1)
        assert head._polling is not None
        for task in (head._polling, *ends):  # the head dies
            task.cancel()
        await until(lambda: handle.num_open == 0)


async def test_a_keeper_that_does_not_answer_for_a_moment_is_asked_again(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.0)
    actor, failures = keeper_actor(), [ActorUnavailableError("no answer", None)]
    endings = actor.endings

    async def unavailable_at_first(num_known: int) -> Any:
        if failures:
            raise failures.pop()
        return await endings(num_known)

    actor.endings = unavailable_at_first
    keeper = RayKeeper(Handle(actor))
    keeper.start(spec_of(0), PLACEMENT)
    end = asyncio.create_task(keeper.ended(("decode-0", 1)))
    await until(lambda: bool(workers.ends) and not failures)
    assert not end.done()
    workers.ends["decode-0"].set_result(None)
    assert await end == Outcome("the process ended")


async def test_every_worker_ends_with_the_keeper() -> None:
    class LostKeeper:
        async def start(self, spec: WorkerSpec, placement: Placement) -> None: ...

        async def endings(self, num_known: int) -> None:
            raise RayError("the keeper is gone")

    keeper = RayKeeper(Handle(LostKeeper()))
    keeper.start(spec_of(0), PLACEMENT)
    assert await keeper.ended(("decode-0", 1)) == Outcome("the keeper is gone")
    assert await keeper.ended(("decode-1", 1)) == Outcome("the keeper is gone")


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
    head._planning = SimpleNamespace(configure=lambda config, terms: None)  # type: ignore[assignment]
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
    keeper = keeper_actor()
    for number in order:
        await keeper.remember(*calls[number])
    assert (await keeper.config()).pools.decode.instances == 4
