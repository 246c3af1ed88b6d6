"""Instances and loads for replays in virtual time."""

from collections.abc import Sequence

from pdserve.core.config import ClusterConfig
from pdserve.core.messages import KVLayout, Role
from pdserve.engine.gpu import DeviceInfo, Node
from pdserve.engine.gpu_peaks import gpu_model
from pdserve.loadgen.arrivals import Poisson
from pdserve.loadgen.lengths import Fixed
from pdserve.loadgen.workload import Drawn
from pdserve.planner.durations import DecodeSeconds, Durations
from pdserve.planner.offered_load import OfferedLoad
from pdserve.planner.priors import Rates
from pdserve.planner.splits import Site
from pdserve.planner.virtual_cluster import Arrival, VirtualCluster
from pdserve.planner.virtual_instance import InstanceShape
from pdserve.router.config import RouterConfig

from .support import checkpoint

LAYOUT = KVLayout(
    num_layers=2, num_kv_heads=2, head_dim=8, dtype="float16", block_size=16, model_fingerprint="m"
)
DECODE = DecodeSeconds(0.02, 1e-6, 1e-4)
DURATIONS = Durations(
    prefill_step_s=0.01,
    prefill_token_s=1e-4,
    prefill_square_s=1e-8,
    decode=DECODE,
    decode_large=DECODE,
    large_batch=1,
    transfer_s=0.001,
    link_bytes_per_s=1e9,
)
NO_PREFILL_ON_DECODE = RouterConfig(prefill_on_decode_factor=None, max_queued_requests=1 << 20)


def shape(role: Role, num_blocks: int = 1000, durations: Durations = DURATIONS) -> InstanceShape:
    return InstanceShape(
        role=role,
        durations=durations,
        num_blocks=num_blocks,
        max_model_len=4096,
        max_batch_tokens=512,
        max_batch_size=32,
    )


def cluster(
    num_prefill: int, num_decode: int, *, num_blocks: int = 1000, durations: Durations = DURATIONS
) -> VirtualCluster:
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
    return VirtualCluster(
        [shape(role, num_blocks, durations) for role in roles], LAYOUT, NO_PREFILL_ON_DECODE
    )


def arrivals(requests: Sequence[tuple[float, int, int]]) -> list[Arrival]:
    """(at_s, prompt tokens, output tokens) of requests that share nothing."""
    return [Arrival(at_s, (i,) * prompt, output) for i, (at_s, prompt, output) in enumerate(requests)]


def drawn(rate: float, prompt: int, output: int, num_requests: int) -> OfferedLoad:
    return OfferedLoad(Drawn(Poisson(rate), Fixed(prompt), Fixed(output)), num_requests)


def site(num_gpus: int = 2, gpu: str = "h200", num_layers: int = 32) -> Site:
    """GPUs for a Llama; with 32 layers of 8 billion parameters."""
    kind = gpu_model(gpu)
    devices = tuple(
        DeviceInfo(i, kind.name, str(i), kind.memory_bytes, kind.memory_bytes) for i in range(num_gpus)
    )
    node = Node("there", tuple(range(64)), 1 << 40, 1 << 40, devices, "13.0")
    rates = Rates(kind.peaks.flops_per_s, kind.peaks.bytes_per_s, kind.link_bytes_per_s)
    return Site(ClusterConfig(device="cuda"), checkpoint(num_hidden_layers=num_layers), (node,), rates)
