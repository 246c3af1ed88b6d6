"""Facts about a host, collected on it by `look`, and the head's verdict on whether it can serve."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..core.config import ClusterConfig
from ..core.config_types import format_size
from ..core.devices import DeviceKind
from ..core.errors import CheckpointError
from ..core.reach import reach
from ..engine.checkpoint import fingerprint, resolve_model_path
from ..engine.full import full_parts
from ..engine.gpu import DeviceInfo, Node, probe_node

CLOCK_TOLERANCE_S = 60.0  # only people compare clocks of two hosts, in logs and traces


@dataclass(frozen=True)
class HostFacts:
    """One host's answer."""

    version: str
    clock_s: float  # since the epoch
    node: Node
    fingerprint: str | None  # of the checkpoint; None: it cannot be read
    checkpoint_error: str = ""
    full: tuple[tuple[str, int], ...] = ()  # parts of the host, and their sizes in bytes
    router_error: str = ""  # why the head's port for workers cannot be reached from there

    @staticmethod
    def parse(answer: Mapping[str, Any], name: str) -> "HostFacts":
        """Parses the result of `look`. Raises KeyError or TypeError for that of another version."""
        node = Node(
            name,
            tuple(answer["cores"]),
            answer["total_memory_bytes"],
            answer["available_memory_bytes"],
            tuple(DeviceInfo(*device) for device in answer["devices"]),
            answer["torch_cuda"],
        )
        same = ("version", "clock_s", "fingerprint", "checkpoint_error", "router_error")
        full = tuple((folder, num_bytes) for folder, num_bytes in answer["full"])
        return HostFacts(node=node, full=full, **{key: answer[key] for key in same})


def look(model_path: str, router_address: tuple[str, int] | None, ray_folder: str) -> dict[str, Any]:
    """Collects the facts. Runs on the host in question, which may have another version: plain values in,
    plain values out."""
    node = probe_node()
    found, checkpoint_error = None, ""
    try:
        found = fingerprint(resolve_model_path(model_path))
    except (CheckpointError, OSError) as error:
        checkpoint_error = str(error)
    return {
        "version": __version__,
        "clock_s": time.time(),
        "cores": list(node.cores),
        "total_memory_bytes": node.total_memory_bytes,
        "available_memory_bytes": node.available_memory_bytes,
        "devices": [(one.index, one.name, one.uuid, one.total_bytes, one.free_bytes) for one in node.devices],
        "torch_cuda": node.torch_cuda,
        "fingerprint": found,
        "checkpoint_error": checkpoint_error,
        "full": list(full_parts(ray_folder)),
        "router_error": "" if router_address is None else reach(router_address),
    }


def refusal(
    here: HostFacts, there: HostFacts, config: ClusterConfig, device: DeviceKind, router: tuple[str, int]
) -> str:
    """Explains why no instance may start there, and the fix; empty when instances may."""
    if there.version != here.version:
        return (
            f"it runs pdserve {there.version}, the head {here.version}; install {here.version} there, and"
            " restart Ray there so that its processes use it"
        )
    if there.router_error:
        host, port = router
        return (
            f"from there {host}:{port}, where the head waits for workers, cannot be reached"
            f" ({there.router_error}); let all TCP between the hosts of the cluster through its firewalls"
        )
    if there.full:
        return no_space(there.full)
    if there.checkpoint_error:
        return (
            f"model.path: {there.checkpoint_error} (on this host); copy the head's checkpoint to the same"
            " path there"
        )
    if there.fingerprint != here.fingerprint:
        return (
            f"model.path: another checkpoint lies at {config.model.path} there (fingerprint"
            f" {there.fingerprint}, the head's is {here.fingerprint}); copy the head's there"
        )
    pools = [pool for _, pool in config.pools.items()]
    least = min(pool.num_host_cores if device == "cuda" else pool.devices_per_instance for pool in pools)
    num_cores = len(there.node.cores)
    if num_cores < least:
        key = "cpus_per_instance" if device == "cuda" else "devices_per_instance"
        return (
            f"it has {num_cores} core(s), and no instance takes less than {least} (pools.*.{key}); give Ray"
            " more of its cores, or take it out of the file"
        )
    return ""


def no_space(full: tuple[tuple[str, int], ...]) -> str:
    """Explains why nothing may start on a host with these full parts, and the fix; empty when there are
    none."""
    parts = ", ".join(f"{part} ({format_size(num_bytes)})" for part, num_bytes in full)
    return parts and f"no space is left in {parts} there; make room: the host is then used again"


def warning(here: HostFacts, there: HostFacts, device: DeviceKind, round_trip_s: float) -> str:
    """Describes a problem that does not keep the host from serving, and its fix; empty when there is none."""
    ahead_s = there.clock_s - here.clock_s
    if abs(ahead_s) > CLOCK_TOLERANCE_S + round_trip_s:
        which = "ahead of" if ahead_s > 0 else "behind"
        return (
            f"its clock is {abs(ahead_s):.0f} s {which} the head's, so times in logs and traces differ; set"
            " it by NTP"
        )
    if device == "cuda" and not there.node.usable_devices:
        return "it has no GPU that torch can use: no instance starts there"
    return ""
