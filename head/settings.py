"""Derives the settings of the head's parts from a configuration."""

from collections.abc import Iterable
from dataclasses import replace

from ..core.config import ClusterConfig
from ..core.devices import DeviceKind
from ..core.messages import KVLayout, Role
from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..engine.gpu import Node
from ..planner.plan import Plan
from ..router.config import RouterConfig
from ..router.cores import Placement
from ..router.planning import Bounds, Objective, PoolLimits, Ratio, Terms
from ..telemetry.steps import StepCosts
from ..worker.spec import WorkerSpec
from .ports import InstanceResources


def pool_sizes(config: ClusterConfig) -> dict[Role, int]:
    return {role: pool.num_instances for role, pool in config.pools.items()}


def pools_are_alike(config: ClusterConfig) -> bool:
    """Whether a worker of one pool could serve in the other."""
    same = {"instances": 0}
    return config.pools.prefill.model_copy(update=same) == config.pools.decode.model_copy(update=same)


def instance_resources(config: ClusterConfig, device: DeviceKind) -> list[InstanceResources]:
    """Returns the resources that each instance of the configuration reserves, the largest first."""
    found = [
        InstanceResources(pool.num_cpus, pool.gpu_share if device == "cuda" else None)
        for _, pool in config.pools.items()
        for _ in range(pool.num_instances)
    ]
    return sorted(found, key=lambda one: (one.gpu_share or 0.0, one.num_cpus), reverse=True)


def vacated(node: Node, living: Iterable[tuple[WorkerSpec, Placement]]) -> Node:
    """Returns a host as it would be without the workers that are running there: what they hold is planned
    for them again. Those that still load hold less than they will, but no more than the host has is free."""
    held = sum(spec.memory_bytes for spec, placement in living if placement.node_id == node.name)
    return replace(
        node, available_memory_bytes=min(node.total_memory_bytes, node.available_memory_bytes + held)
    )


def planner_terms(config: ClusterConfig, plan: Plan, layout: KVLayout, max_instances: int) -> Terms:
    """Returns what the planner has to know of a configuration; `max_instances` have a place."""
    ranges = {role: pool.allowed_instances for role, pool in config.pools.items()}
    prefill, decode = ranges[Role.PREFILL], ranges[Role.DECODE]
    pools = config.pools
    return Terms(
        objective=Objective(config.planner.objective),
        horizon_s=config.planner.horizon_s,
        bounds=Bounds(Ratio(prefill.min, decode.min), Ratio(prefill.max, decode.max), max_instances),
        ttft_slo_s=config.slo.ttft_ms / 1e3,
        itl_slo_s=config.slo.itl_ms / 1e3,
        router=RouterConfig.of(config),
        layout=layout,
        max_model_len=plan.max_model_len,
        prefill=PoolLimits(pools.prefill.max_batch_tokens, pools.prefill.max_batch_size),
        decode=PoolLimits(pools.decode.max_batch_tokens, pools.decode.max_batch_size),
        can_flip=pools_are_alike(config),
    )


def step_costs(config: ClusterConfig, plan: Plan) -> StepCosts:
    """Returns the costs of a step from the model's shape. Embeddings are looked up, so only the output matrix
    computes, once per sampled token."""
    model = open_checkpoint(resolve_model_path(config.model.path)).config
    embedding = model.vocab_size * model.hidden_size
    num_in_layers = plan.num_parameters - embedding * (1 if model.tie_word_embeddings else 2)
    return StepCosts(
        flops_per_token=2.0 * num_in_layers,
        flops_per_sample=2.0 * embedding,
        flops_per_pair=4.0 * model.num_layers * model.q_size,
        weight_bytes=plan.weights_bytes,
        kv_bytes_per_token=plan.kv_bytes_per_token,
    )
