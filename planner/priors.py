"""The durations of steps and transfers before any was measured, from a model's shape and a device's rates."""

from dataclasses import dataclass

from ..core.latency import LatencyPriors
from ..engine.gpu_peaks import Peaks, peaks_of
from ..engine.model_config import ModelConfig
from .plan import Plan

# performance of ordinary cores, GPUs and links; only the first placements depend on it
CORE_FLOPS_PER_S = 1e11
MEMORY_BYTES_PER_S = 2e10
LINK_BYTES_PER_S = 5e9
GPU_PEAKS = Peaks(312e12, 1.555e12)  # for a GPU with an unknown name
GPU_LINK_BYTES_PER_S = 2e10
REACHED = 0.5  # fraction of a GPU's peaks


@dataclass(frozen=True)
class Rates:
    """The throughput of one instance, per second."""

    flops: float
    memory_bytes: float
    link_bytes: float  # between instances, in one direction


def rates_of(plan: Plan) -> Rates:
    """Returns a cautious estimate for the devices of a plan."""
    if plan.device == "cpu":
        num_threads = max(pool.num_threads for pool in plan.pools)
        return Rates(CORE_FLOPS_PER_S * num_threads, MEMORY_BYTES_PER_S, LINK_BYTES_PER_S)
    peaks = next((peaks_of(gpu.name) for gpu in plan.gpus if gpu.instances), None) or GPU_PEAKS
    return Rates(REACHED * peaks.flops_per_s, REACHED * peaks.bytes_per_s, GPU_LINK_BYTES_PER_S)


def priors(model: ModelConfig, plan: Plan, rates: Rates) -> LatencyPriors:
    """Returns the roofline's durations."""
    return LatencyPriors.roofline(
        num_parameters=plan.num_parameters,
        weight_bytes=plan.weights_bytes,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        attention_flops_per_square=4.0 * model.num_layers * model.q_size,
        flops_per_s=rates.flops,
        memory_bytes_per_s=rates.memory_bytes,
        link_bytes_per_s=rates.link_bytes,
    )
