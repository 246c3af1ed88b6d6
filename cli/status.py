"""`pdserve status`: reads like `kubectl get`."""

from collections.abc import Iterable, Sequence

from google.protobuf.json_format import MessageToJson
from rich.text import Text

from ..core.config_types import format_size
from ..proto import pdserve_pb2 as pb
from .terminal import harmless

STATES = {
    pb.WORKER_STATE_STARTING: "Starting",
    pb.WORKER_STATE_READY: "Ready",
    pb.WORKER_STATE_DRAINING: "Draining",
    pb.WORKER_STATE_DRAINED: "Drained",
    pb.WORKER_STATE_STOPPING: "Stopping",
    pb.WORKER_STATE_FAILED: "Failed",
}
HOST_STATES = {
    pb.HOST_STATE_AWAITED: "Awaited",
    pb.HOST_STATE_CHECKING: "Checking",
    pb.HOST_STATE_JOINED: "Joined",
    pb.HOST_STATE_REFUSED: "Refused",
    pb.HOST_STATE_LOST: "Lost",
    pb.HOST_STATE_LEAVING: "Leaving",
}
HOST_COLUMNS = ("HOST", "NAME", "STATE", "SINCE", "CORES", "GPUS", "MEMORY", "INSTANCES")
COLUMNS = ("NAME", "ROLE", "STATE", "RUNNING", "WAITING", "BLOCKS", "TOKENS/S", "AGE", "RESTARTS")
GAP = 3
STYLES = {
    "green": ("Ready", "Joined"),
    "yellow": ("Starting", "Draining", "Drained", "Stopping", "Awaited", "Checking", "Leaving"),
    "bold red": ("Failed", "Refused", "Lost"),
}
WIDE_COLUMNS = (*COLUMNS, "NODE", "PID", "DEVICES", "KERNELS")


def as_json(status: pb.ClusterStatus, indent: int | None = 2) -> str:
    return MessageToJson(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent
    )


def as_table(status: pb.ClusterStatus, wide: bool = False, gap: int = GAP) -> str:
    """A line on the cluster, a row for each worker, one for each host where there are several, and what is
    wrong or waits. A smaller `gap` between columns leaves out the restarts, or the ages where a worker was
    restarted."""
    rows: list[Sequence[str]] = [WIDE_COLUMNS if wide else COLUMNS]
    rows += [_row(worker, wide) for worker in status.workers]
    if gap < GAP and not wide:
        has_restarts = any(worker.num_restarts for worker in status.workers)
        left_out = COLUMNS.index("AGE" if has_restarts else "RESTARTS")
        rows = [(*row[:left_out], *row[left_out + 1 :]) for row in rows]
    lines = [summary(status), "", *aligned(rows, gap)]
    if len(status.hosts) > 1 or wide:
        lines += ["", *aligned([HOST_COLUMNS, *map(_host_row, status.hosts)])]
    if status.degraded:
        lines += ["", status.degraded]
    if (unequal := unequal_kernels(status.workers)) is not None:
        lines += ["", unequal]
    messages = [
        f"{worker.worker_id}: {text}" for worker in status.workers if (text := worker.message or worker.phase)
    ]
    messages += [
        f"host {host.address}: {host.message}" for host in status.hosts if host.message not in status.degraded
    ]
    return "\n".join([*lines, *([""] if messages else []), *messages])


def as_text(status: pb.ClusterStatus, wide: bool, width: int) -> Text:
    """Returns the table for a terminal of so many columns: with colours, and narrower where it has to be."""
    table = _folded(as_table(status, wide), width)
    if max(map(len, table.splitlines())) > width:
        gap = 1 if any(one.num_restarts for one in status.workers) else 2
        table = _folded(as_table(status, wide, gap), width)
    text = Text(harmless(table), no_wrap=True, overflow="ellipsis")
    for style, words in STYLES.items():
        text.highlight_regex(rf"\b({'|'.join(words)})\b(\(\d+%\))?", style)
    return text


def _folded(table: str, width: int) -> str:
    """Returns a table whose first line has its last part below it if it is too long: the part that changes is
    not cut off."""
    heading, _, rest = table.partition("\n")
    if len(heading) <= width:
        return table
    state, _, requests = heading.rpartition("; ")
    return "\n".join((state, requests, rest))


def summary(status: pb.ClusterStatus) -> str:
    state = "shutting down" if status.shutting_down else "serving" if status.serving else "not serving"
    pools = ", ".join(f"{pool.role} {pool.ready}/{pool.instances} ready" for pool in status.pools)
    requests = f"{status.num_running_requests} running, {status.num_queued_requests} queued"
    return f"{status.model}: {state} for {age(status.uptime_s)}; {pools}; {requests}"


def age(seconds: float) -> str:
    """Formats an age as kubectl does: 12s, 5m, 3h, 2d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (unit == "m" and seconds >= length):
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def state_of(worker: pb.WorkerStatus) -> str:
    name = STATES.get(worker.state, "Unknown")
    return f"{name}({worker.fraction:.0%})" if worker.state == pb.WORKER_STATE_STARTING else name


def _row(worker: pb.WorkerStatus, wide: bool) -> Sequence[str]:
    row = (
        worker.worker_id,
        worker.role,
        state_of(worker),
        str(worker.num_running),
        str(worker.num_waiting),
        f"{worker.num_free_blocks}/{worker.num_blocks}",
        f"{worker.tokens_per_s:.0f}",
        age(worker.age_s),
        str(worker.num_restarts),
    )
    if not wide:
        return row
    pids, devices = ",".join(map(str, (worker.pid or "-", *worker.rank_pids))), ",".join(worker.devices)
    return (*row, worker.node or "-", pids, devices or "-", worker.kernels or "-")


def unequal_kernels(workers: Iterable[pb.WorkerStatus]) -> str | None:
    """Returns who computes with which kind of kernel where there are several kinds: a stream that goes on at
    a worker of another kind may go on with other tokens."""
    by_kind: dict[str, list[str]] = {}
    for worker in workers:
        if worker.kernels:
            by_kind.setdefault(worker.kernels, []).append(worker.worker_id)
    if len(by_kind) < 2:
        return None
    kinds = "; ".join(f"{kind} on {', '.join(ids)}" for kind, ids in sorted(by_kind.items()))
    return f"kernels differ, and so may the tokens of a stream that moves: {kinds}"


def _host_row(host: pb.HostStatus) -> Sequence[str]:
    return (
        host.address,
        host.name or "-",
        HOST_STATES.get(host.state, "Unknown"),
        age(host.since_s),
        f"{host.num_cores_taken:g}/{host.num_cores}",
        f"{host.num_gpus_taken:g}/{host.num_gpus}",
        format_size(host.memory_bytes) if host.memory_bytes else "-",
        ",".join(host.worker_ids) or "-",
    )


def aligned(rows: Iterable[Sequence[str]], gap: int = GAP) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (" " * gap).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
