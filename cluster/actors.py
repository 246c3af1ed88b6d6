"""The Ray actors: thin hosts of a worker process and of the head. Everything inside is loaded in the actor's
own process."""

import asyncio
import gc
import logging
import os
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import ClusterConfig
from ..core.errors import PdserveError
from ..core.log_settings import LogSettings
from ..head.ports import Key, Outcome, Version
from ..head.spec import Endpoints, HeadSpec
from ..router.cores import Placement
from ..telemetry.logs import configure
from ..worker.spec import WorkerSpec
from . import ray_folder

log = logging.getLogger(__name__)


KEEPER_NAME = "pdserve-keeper"
NAMESPACE = "pdserve"


def reason_of(error: RayError) -> str:
    """Returns why an actor ended, or a call of it failed, in one line unless it is a message of ours."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return (
            str(error.cause)
            if isinstance(error.cause, PdserveError)
            else f"{type(error.cause).__name__}: {error.cause}"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    began = not (isinstance(error, RayActorError) and error.actor_init_failed)
    return lines[0] if began else f"the process did not start: {lines[-1]}"


def options_of(spec: WorkerSpec, placement: Placement) -> dict[str, Any]:
    """Returns the Ray options of an actor of a worker, one for each rank; all are on the node where the
    instance has its place. Ray chooses which of the node's GPUs it gets, and hides the others from the
    process. Without a `runtime_env`, the actor may take a process that runs already."""
    return {
        "num_cpus": spec.pool.num_cpus / spec.num_ranks,
        "num_gpus": spec.need.gpu_share,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(placement.node_id, soft=False),
    }


def variables_of(spec: WorkerSpec) -> dict[str, str]:
    """Returns a worker's environment; torch reads it when it is imported."""
    variables = {"OMP_NUM_THREADS": str(spec.pool.num_threads_per_rank)}
    if spec.device == "cuda":
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # indices mean the same to CUDA, NVML and Ray
    return variables


@ray.remote(max_restarts=0, max_concurrency=2)
class WorkerActor:
    """Hosts one rank of a worker. `run` occupies one of the actor's threads while the worker is running,
    `stop` needs the other."""

    def __init__(self, spec: WorkerSpec) -> None:
        os.environ.update(variables_of(spec))
        # they import torch, which other actors do not need
        from ..worker.process import WorkerProcess
        from ..worker.rank_process import RankProcess

        if spec.log is not None:
            configure(spec.log, spec.name)
        if spec.host is None:
            spec = replace(spec, host=ray.util.get_node_ip_address())
        self._session = ray_folder.session_folder()
        self._accept_open_ray = spec.accept_open_ray
        process = RankProcess if spec.rank else WorkerProcess
        self._worker = process(replace(spec, socket_root=self._session))

    def run(self) -> None:
        """Runs the worker. Raises SharedRayFolder, so that `status` shows it, when other users of this node
        could hijack the worker."""
        ray_folder.check(self._session, ray_folder.sockets(), self._accept_open_ray)
        self._worker.run()

    def stop(self) -> None:
        self._worker.stop()


async def outcome_of(run: Awaitable[None]) -> Outcome:
    """Returns the outcome of a worker's `run`, once it is over. A broken connection about which Ray knows no
    more, as when the host has gone down, is no evidence of a death."""
    try:
        await run
    except RayError as error:
        log.debug("a worker ended: %s", error)
        has_died = not isinstance(error, ActorUnavailableError)
        return Outcome(reason_of(error), isinstance(error, RayTaskError), has_died)
    return IN_ORDER


async def outcome_of_ranks(runs: Sequence[Awaitable[Outcome]]) -> Outcome:
    """Returns the outcome of a worker once its rank 0 is over, or another rank has ended other than in
    order."""
    tasks = {asyncio.ensure_future(run): rank for rank, run in enumerate(runs)}
    ended: set[asyncio.Future[Outcome]] = set()
    while True:
        done, _ = await asyncio.wait(tasks.keys() - ended, return_when=asyncio.FIRST_COMPLETED)
        ended |= done
        for task in sorted(done, key=tasks.__getitem__):
            outcome, rank = task.result(), tasks[task]
            if rank == 0:
                return outcome
            if outcome != IN_ORDER:
                return replace(outcome, reason=f"rank {rank}: {outcome.reason}")


IN_ORDER = Outcome("the process ended")


def is_up(node_id: str) -> bool:
    """Whether Ray is known to run on the host. When it ends there, it ends its actors, and tells of the host
    first."""
    try:
        return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)
    except Exception as error:  # the end of a worker is reported all the same
        log.warning("Ray does not list its hosts: %s: %s", type(error).__name__, error)
        return False


@dataclass
class _Kept:
    spec: WorkerSpec
    placement: Placement
    actors: Sequence[Any]  # by rank
    end: "asyncio.Task[None]"


POLL_S = 10.0  # after which a head that waits for endings asks again, so that calls of dead heads end
MAX_ENDINGS = 10_000  # kept for heads that were away


@ray.remote(num_cpus=0, max_concurrency=1000)
class KeeperActor:
    """Holds the state that outlives a head: the workers' actors, and the configuration in force. Ray ends
    actors together with their creator: workers end with the keeper, and the keeper with the process that
    launched the cluster."""

    def __init__(self, config: ClusterConfig, log_settings: LogSettings | None = None) -> None:
        if log_settings is not None:
            configure(log_settings, "keeper")
        self._config = config
        self._version = 0, 0
        self._kept: dict[Key, _Kept] = {}
        self._endings: deque[tuple[Key, Outcome]] = deque(maxlen=MAX_ENDINGS)
        self._num_endings = 0
        self._has_ended = asyncio.Condition()

    async def live(self) -> None:
        """Never returns; fails when the keeper dies."""
        await asyncio.Event().wait()

    async def start(self, spec: WorkerSpec, placement: Placement) -> None:
        """Starts a worker's processes; `endings` reports their end."""
        options = WorkerActor.options(**options_of(spec, placement))  # type: ignore[attr-defined]  # ray.remote's
        ranks = [spec.of_rank(rank, placement.cores) for rank in range(spec.num_ranks)]
        actors = [options.remote(rank) for rank in ranks]
        end = asyncio.get_running_loop().create_task(self._await_end(spec.key, placement.node_id, actors))
        self._kept[spec.key] = _Kept(spec, placement, actors, end)

    async def _await_end(self, key: Key, node_id: str, actors: Sequence[Any]) -> None:
        runs = [asyncio.ensure_future(outcome_of(actor.run.remote())) for actor in actors]
        outcome = await outcome_of_ranks(runs)
        if outcome.has_died and not await asyncio.to_thread(is_up, node_id):
            outcome = replace(outcome, has_died=False)
        for actor in actors:  # one whose `run` has returned is still running
            ray.kill(actor)
        await asyncio.wait(runs)
        self._kept.pop(key, None)
        self._endings.append((key, outcome))
        self._num_endings += 1
        async with self._has_ended:
            self._has_ended.notify_all()

    async def endings(self, num_known: int) -> tuple[int, list[tuple[Key, Outcome]]]:
        """Returns the number of processes of which nothing is left, and all of those after the first
        `num_known` in the order of their ends. Waits for one, but at most `POLL_S`."""
        async with self._has_ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._has_ended.wait_for(lambda: self._num_endings > num_known)
        num_new = min(self._num_endings - num_known, len(self._endings))
        return self._num_endings, list(islice(self._endings, len(self._endings) - num_new, None))

    async def stop(self, key: Key) -> None:
        """Asks the process to end."""
        if key in self._kept:
            self._kept[key].actors[0].stop.remote()  # it ends the other ranks

    async def kill(self, key: Key) -> None:
        for actor in self._kept[key].actors if key in self._kept else ():
            ray.kill(actor)

    async def living(self) -> list[tuple[WorkerSpec, Placement]]:
        """Returns the running processes, oldest first."""
        return [(kept.spec, kept.placement) for kept in self._kept.values()]

    async def remember(self, config: ClusterConfig, version: Version) -> None:
        """Stores the configuration; the newest is kept, regardless of the order of arrival."""
        if version > self._version:
            self._config, self._version = config, version

    async def config(self) -> ClusterConfig:
        return self._config


@ray.remote(num_cpus=0)
class HeadActor:
    """Hosts the head: gateway, router and controller."""

    def __init__(self, spec: HeadSpec, keeper: Any) -> None:
        # imports the gateway, which other actors do not need
        from ..head.head import Head
        from .keeper import RayKeeper
        from .nodes import RayNodes

        if spec.log is not None:
            configure(spec.log, "head")
        self._head = Head(spec, RayKeeper(keeper), RayNodes, spec.host or ray.util.get_node_ip_address())

    async def start(self) -> Endpoints:
        """Starts the head; returns its addresses once it listens. What its start has left for good is not
        visited by the garbage collector again: a full collection would stop every stream for as long."""
        endpoints = await self._head.start()
        gc.collect()
        gc.freeze()
        return endpoints

    async def wait(self) -> None:
        """Returns when the cluster has been shut down."""
        await self._head.wait()

    async def stop(self) -> None:
        await self._head.stop()

    async def metrics(self) -> bytes:
        return self._head.metrics()
