"""The Cluster service: status, apply, scale, drain and the planner's account for operators."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from ...core.config import ClusterConfig
from ...core.config_file import parse_cluster_config
from ...core.errors import InvalidRequest
from ...core.hosts import HostState, HostStatus
from ...core.validation import check_name
from ...proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from ..explain import explanation, find_timeline, summary
from ..frontend import ClusterStatus, Frontend, WorkerState, WorkerStatus
from ..planner_report import planner_report
from ..serving import Shared
from ..translate import NeedsRestart, UnknownRequest, translated, write
from ..vetting import refuse_unknown_fields
from .auth_interceptor import CALLER
from .scaling import scaled

log = logging.getLogger(__name__)

MAX_CONFIG_CHARS = 64 << 10  # of a cluster.yaml; a larger one would block the loop that streams run on
MAX_FILENAME_CHARS = 4096
DEFAULT_LISTED, MAX_LISTED = 20, 200  # requests; more would hold the loop for too long
Context = grpc.aio.ServicerContext[Any, Any]


class ClusterService(pdserve_pb2_grpc.ClusterServicer):
    """The operator's endpoint."""

    def __init__(self, frontend: Frontend, shared: Shared) -> None:
        self._frontend = frontend
        self._shared = shared
        self._applying = asyncio.Lock()
        self._drains: set[asyncio.Task[None]] = set()
        self._last: tuple[ClusterStatus, bytes] | None = None  # one message for all watchers

    async def close(self) -> None:
        """Abandons drains that are still in progress."""
        for drain in self._drains:
            drain.cancel()
        await asyncio.gather(*self._drains, return_exceptions=True)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.ClusterStatus:
        async with translated(context):
            return self._message(self._frontend.status())
        raise AssertionError("translated() ends the call")

    async def WatchStatus(self, request: pb.WatchStatusRequest, context: Context) -> None:  # type: ignore[override]
        async with translated(context), aclosing(self._frontend.watch()) as states:
            async for status in states:
                if self._last is None or self._last[0] is not status:
                    self._last = status, self._message(status).SerializeToString()
                await write(context, self._last[1])
            await self._shared.answered()

    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        async with translated(context), self._applying:
            refuse_unknown_fields(request)
            check_name("filename", request.filename, MAX_FILENAME_CHARS)
            if len(request.config_yaml) > MAX_CONFIG_CHARS:
                got = f"{len(request.config_yaml)} characters"
                raise InvalidRequest("config_yaml", got, f"at most {MAX_CONFIG_CHARS} characters")
            new = parse_cluster_config(request.config_yaml, request.filename or "cluster.yaml")
            return await self._change(new.keeping(self._frontend.status().instances), request.dry_run)
        raise AssertionError("translated() ends the call")

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ApplyResponse:
        async with translated(context), self._applying:
            refuse_unknown_fields(request)
            return await self._change(scaled(self._config, request.pools), request.dry_run)
        raise AssertionError("translated() ends the call")

    @property
    def _config(self) -> ClusterConfig:
        """Returns the configuration in force, with the numbers of instances that the planner chose."""
        return self._shared.config.sized(self._frontend.status().instances)

    async def _change(self, new: ClusterConfig, dry_run: bool) -> pb.ApplyResponse:
        old = self._config
        if old.changes_needing_restart(new):
            raise NeedsRestart(old, new)
        await self._frontend.apply(new, dry_run)
        if not dry_run:
            self._shared.config = new
        return pb.ApplyResponse(changes=_changes(old, new))

    async def Planner(self, request: pb.PlannerRequest, context: Context) -> pb.PlannerReport:
        async with translated(context):
            refuse_unknown_fields(request)
            return planner_report(self._frontend.planner())
        raise AssertionError("translated() ends the call")

    async def Drain(self, request: pb.DrainRequest, context: Context) -> None:  # type: ignore[override]
        async with translated(context):
            refuse_unknown_fields(request)
            if request.shutdown and request.worker_ids:
                raise InvalidRequest(
                    "worker_ids", list(request.worker_ids), "no names together with shutdown"
                )
            drain = asyncio.create_task(self._frontend.drain(tuple(request.worker_ids), request.shutdown))
            self._drains.add(drain)
            drain.add_done_callback(self._drained)
            async with aclosing(self._until(drain)) as states:
                async for status in states:
                    await write(context, _progress(status, request.worker_ids))
            await asyncio.shield(drain)  # it continues when the client disconnects
            if request.shutdown:
                await self._shared.answered()
            last = _progress(self._frontend.status(), request.worker_ids)
            last.done = True
            await write(context, last)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.Explanation:
        async with translated(context):
            refuse_unknown_fields(request)
            timeline = find_timeline(
                self._frontend.explain, request.request_id, CALLER.get(), self._shared.access
            )
            if timeline is None:
                raise UnknownRequest(request.request_id)
            return explanation(timeline)
        raise AssertionError("translated() ends the call")

    async def ListRequests(
        self, request: pb.ListRequestsRequest, context: Context
    ) -> pb.ListRequestsResponse:
        async with translated(context):
            refuse_unknown_fields(request)
            wanted = request.max_requests if request.HasField("max_requests") else DEFAULT_LISTED
            if not 1 <= wanted <= MAX_LISTED:
                raise InvalidRequest("max_requests", wanted, f"1 to {MAX_LISTED}")
            caller = CALLER.get()
            scope = "" if caller is None or caller.key.is_admin else caller.scoped("")
            now_s = asyncio.get_running_loop().time()
            found = self._frontend.latest(wanted, scope)
            return pb.ListRequestsResponse(requests=[summary(timeline, scope, now_s) for timeline in found])
        raise AssertionError("translated() ends the call")

    def _drained(self, drain: "asyncio.Task[None]") -> None:
        self._drains.discard(drain)
        if not drain.cancelled() and (error := drain.exception()) is not None:
            log.warning("drain: %s", error)

    async def _until(self, drain: "asyncio.Task[None]") -> AsyncGenerator[ClusterStatus, None]:
        """Yields the states of the cluster until a drain is over."""
        async with aclosing(self._frontend.watch()) as states:
            while True:
                following = asyncio.ensure_future(anext(states, None))
                try:
                    await asyncio.wait((following, drain), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait((following,))
                status = None if following.cancelled() else following.result()
                if status is None:
                    return
                yield status

    def _message(self, status: ClusterStatus) -> pb.ClusterStatus:
        return pb.ClusterStatus(
            model=self._shared.config.model.name,
            serving=status.serving,
            shutting_down=status.shutting_down,
            num_queued_requests=status.num_queued_requests,
            num_running_requests=status.num_running_requests,
            pools=[
                pb.PoolStatus(
                    role=role.value, instances=instances, ready=_num_ready(status.workers, role.value)
                )
                for role, instances in status.instances.items()
            ],
            workers=[_worker(worker) for worker in status.workers],
            uptime_s=status.uptime_s,
            degraded=status.degraded or "",
            hosts=[_host(host) for host in status.hosts],
        )


_STATES = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.DRAINED: pb.WORKER_STATE_DRAINED,
    WorkerState.STOPPING: pb.WORKER_STATE_STOPPING,
    WorkerState.FAILED: pb.WORKER_STATE_FAILED,
}


_HOST_STATES = {
    HostState.AWAITED: pb.HOST_STATE_AWAITED,
    HostState.CHECKING: pb.HOST_STATE_CHECKING,
    HostState.JOINED: pb.HOST_STATE_JOINED,
    HostState.REFUSED: pb.HOST_STATE_REFUSED,
    HostState.LOST: pb.HOST_STATE_LOST,
    HostState.LEAVING: pb.HOST_STATE_LEAVING,
}


def _host(host: HostStatus) -> pb.HostStatus:
    return pb.HostStatus(
        address=host.address,
        name=host.name,
        state=_HOST_STATES[host.state],
        since_s=host.since_s,
        message=host.message,
        num_cores=host.num_cores,
        num_cores_taken=host.num_cores_taken,
        num_gpus=host.num_gpus,
        num_gpus_taken=host.num_gpus_taken,
        memory_bytes=host.memory_bytes,
        worker_ids=host.worker_ids,
    )


def _num_ready(workers: Sequence[WorkerStatus], role: str) -> int:
    return sum(worker.state is WorkerState.READY and worker.role.value == role for worker in workers)


def _worker(worker: WorkerStatus) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        worker_id=worker.worker_id,
        role=worker.role.value,
        state=_STATES[worker.state],
        phase=worker.phase,
        fraction=worker.fraction,
        message=worker.message,
        node=worker.node,
        pid=worker.pid,
        rank_pids=worker.rank_pids,
        devices=worker.devices,
        num_running=worker.num_running,
        num_waiting=worker.num_waiting,
        num_free_blocks=worker.num_free_blocks,
        num_blocks=worker.num_blocks,
        tokens_per_s=worker.tokens_per_s,
        age_s=worker.age_s,
        num_restarts=worker.num_restarts,
        kernels=worker.kernels,
    )


def _progress(status: ClusterStatus, names: Sequence[str]) -> pb.DrainProgress:
    busy = [
        worker.worker_id
        for worker in status.workers
        if worker.num_running + worker.num_waiting and (not names or worker.worker_id in names)
    ]
    return pb.DrainProgress(num_running_requests=status.num_running_requests, worker_ids=busy)


def _changes(old: ClusterConfig, new: ClusterConfig) -> list[pb.ConfigChange]:
    after = dict(_leaves(_values(new)))
    return [
        pb.ConfigChange(key=key, before=before, after=after[key])
        for key, before in _leaves(_values(old))
        if before != after[key]
    ]


def _values(config: ClusterConfig) -> dict[str, Any]:
    hosts = config.hosts
    named = "any host" if hosts.addresses is None else ", ".join(hosts.addresses) or "none"
    min_workers = ", ".join(f"{count} of {name}" for name, count in hosts.node_types.items()) or "none"
    return config.model_dump() | {
        "provider": {"worker_ips": named},
        "available_node_types": {"min_workers": min_workers},
        "max_workers": hosts.max_hosts,
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
