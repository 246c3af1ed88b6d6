"""The device that instances compute on, and the settings that it does not support. Pure: machines in, a
device or findings out."""

from collections.abc import Iterator, Sequence

from ..core.config import ClusterConfig
from ..core.devices import GPU_LINKS, KERNELS, DeviceKind
from ..core.errors import CapacityError, ConfigError
from ..engine.gpu import Node
from .packing import Finding


def resolve_device(config: ClusterConfig, nodes: Sequence[Node]) -> DeviceKind:
    """Resolves `device: auto`: cuda where a machine has GPUs that its torch can use."""
    if config.device != "auto":
        return config.device
    return "cuda" if any(node.usable_devices for node in nodes) else "cpu"


def why_device(config: ClusterConfig, nodes: Sequence[Node]) -> str:
    """Explains the choice in a few words."""
    if config.device != "auto":
        return "as configured"
    num_present, num_usable = (
        sum(len(node.devices) for node in nodes),
        sum(len(node.usable_devices) for node in nodes),
    )
    if num_present and not num_usable:
        return f"torch was built without CUDA, so {_counted(num_present)} cannot be used"
    return f"{_counted(num_usable)} found"


def device_findings(config: ClusterConfig, device: DeviceKind, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Reports settings that the device does not support, and a device that is unavailable."""
    # another machine may come to another device
    wrong = CapacityError if config.device == "auto" else ConfigError
    if device == "cuda" and not any(node.usable_devices for node in nodes):
        has_gpus = any(node.devices for node in nodes)
        why = "torch was built without CUDA" if has_gpus else "no GPU was found"
        expected = (
            "a torch that was built for CUDA" if has_gpus else "a machine with an NVIDIA driver and a GPU"
        )
        yield Finding(CapacityError, f"device: got cuda, but {why}; expected {expected}, or device: cpu")
    if config.kernels not in KERNELS[device]:
        expected = ", ".join(KERNELS[device])
        yield Finding(wrong, f"kernels: got {config.kernels}, expected one of {expected} on device {device}")
    if device == "cpu" and config.kv.transport in GPU_LINKS:
        yield Finding(
            wrong,
            f"kv.transport: got {config.kv.transport}, which is for GPUs; expected auto, shm or gloo on"
            " device cpu",
        )
    for role, pool in config.pools.items():
        if device != "cuda":
            continue
        if pool.tensor_parallel != 1:
            yield Finding(
                wrong,
                f"pools.{role.value}.tensor_parallel: got {pool.tensor_parallel}, expected 1 on device cuda:"
                " the ranks of an instance compute on processors alone",
            )
        elif pool.devices_per_instance != 1:
            yield Finding(
                wrong,
                f"pools.{role.value}.devices_per_instance: got {pool.devices_per_instance}, expected 1 on"
                " device cuda: an instance computes on one GPU; cores of its host process are"
                " cpus_per_instance",
            )


def _counted(num_gpus: int) -> str:
    return f"{num_gpus or 'no'} GPU{'s' * (num_gpus != 1)}"
