"""The status that clients see, from those of the router, the fleet, its processes and the hosts."""

from collections.abc import Callable, Mapping

from ..core.messages import Role
from ..core.status import ClusterStatus, WorkerState, WorkerStatus
from ..router.cores import Key
from ..router.fleet_member import MemberState, MemberStatus
from ..router.hosts import Hosts
from ..router.status import RoutedWorkerStatus, RouterStatus
from .controller import Controller

STATES = {
    MemberState.STARTING: WorkerState.STARTING,
    MemberState.READY: WorkerState.READY,
    MemberState.DRAINING: WorkerState.DRAINING,
    MemberState.STOPPING: WorkerState.STOPPING,
    MemberState.BACKOFF: WorkerState.FAILED,
    MemberState.DRAINED: WorkerState.DRAINED,
}


def cluster_status(
    routed: RouterStatus,
    controller: Controller,
    hosts: Hosts,
    node_of: Callable[[Key], str | None],
    instances: Mapping[Role, int],
    started_s: float,
    now_s: float,
) -> ClusterStatus:
    """`node_of` returns the node that an instance runs on, if it has a place; `instances`: as configured;
    `started_s`: when the head started."""
    rows = {(worker.worker_id, worker.incarnation): worker for worker in routed.workers}
    fleet, problems = controller.fleet, (routed.degraded if routed.workers else None, hosts.problems())

    def row(member: MemberStatus) -> WorkerStatus:
        key = member.worker_id, member.incarnation
        return _row(member, controller, rows.get(key), hosts.names.get(node_of(key) or "", ""), now_s)

    return ClusterStatus(
        serving=fleet.is_serving,
        shutting_down=fleet.is_shutting_down,
        num_queued_requests=routed.num_queued,
        num_running_requests=routed.num_requests - routed.num_queued,
        instances=dict(instances),
        workers=tuple(row(member) for member in fleet.status()),
        uptime_s=now_s - started_s,
        degraded="; ".join(filter(None, problems)) or None,
        hosts=hosts.status(now_s),
    )


def _row(
    member: MemberStatus, controller: Controller, routed: RoutedWorkerStatus | None, node: str, now_s: float
) -> WorkerStatus:
    process = controller.processes.get((member.worker_id, member.incarnation))
    info = process.info if process is not None else None
    return WorkerStatus(
        worker_id=member.worker_id,
        role=member.role,
        state=STATES[member.state],
        phase=controller.phase((member.worker_id, member.incarnation)),
        fraction=process.fraction if process is not None else 0.0,
        message=(member.last_error or "") if member.state is MemberState.BACKOFF else "",
        node=node,
        pid=info.pid if info else 0,
        rank_pids=info.rank_pids if info else (),
        devices=info.devices if info else (),
        kernels=info.kernels if info else "",
        num_running=routed.load.num_running if routed else 0,
        num_waiting=routed.load.num_waiting if routed else 0,
        num_free_blocks=routed.load.num_free_blocks if routed else 0,
        num_blocks=routed.num_blocks if routed else 0,
        tokens_per_s=routed.tokens_per_s if routed else 0.0,
        age_s=now_s - process.started_s if process else 0.0,
        num_restarts=member.num_restarts,
        stalled_s=routed.stalled_s if routed else 0.0,
    )
