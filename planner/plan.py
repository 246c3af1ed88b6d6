"""Computes before anything starts the resources that a configuration needs, the parts that fit, and those
that do not and why. No torch.

`pdserve plan` prints it, `validate` and `up` call `check()`, and the workers are started with the sizes it
chose."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.config import ClusterConfig, PoolSection
from ..core.config_types import format_size
from ..core.devices import DeviceKind
from ..core.errors import CapacityError, ConfigError
from ..core.messages import KVLayout, Role
from ..core.request import DefaultSampling
from ..engine.checkpoint import Checkpoint, open_checkpoint, resolve_model_path
from ..engine.generation_config import default_sampling
from ..engine.gpu import GPU_MEMORY_FRACTION, Node, probe_node
from ..engine.model_config import ModelConfig
from ..kv_transfer.chunk_size import CHUNK_BYTES
from ..kv_transfer.config import TransferConfig
from .device_choice import device_findings, resolve_device, why_device
from .packing import Demand, Finding, Packing
from .ranks import SHARED_BYTES, num_kv_copies, num_parameters_of, num_sharing, rank_findings, rank_model

AUTO_KV_MAX_BYTES = 4 << 30
# share of the available memory that `kv_cache_bytes: auto` lets a machine's instances fill
AUTO_MEMORY_FRACTION = 0.8
# an instance's interpreter and libraries, and the buffers of its first links to others
RUNTIME_BYTES = 384 << 20
# on the GPU, of one instance: CUDA's context, captured graphs, and the buffers of its first links
GPU_RUNTIME_BYTES = 1 << 30
FIRST_LINKS = 4
ROPE_COPIES = 3  # copies of the rope table in its making: angles, cosines and sines, and both side by side
TYPICAL_TOKENS = 2048
NO_DEFAULTS = DefaultSampling()


@dataclass(frozen=True)
class PoolPlan:
    """One pool. Sequence counts are per instance."""

    role: Role
    instances: int
    num_cpus: float
    num_threads: int
    num_ranks: int  # processes of one instance
    num_kv_copies: int  # ranks that hold each KV head
    rank_weights_bytes: int
    gpu_share: float | None  # None on CPU
    instance_bytes: int  # weights, activations, runtime and KV; of the GPU where there is one
    kv_cache_bytes: int
    num_blocks: int
    is_measured: (
        bool  # the workers take as many blocks as they find room for; `num_blocks` is what is expected
    )
    num_max_len_sequences: int
    num_typical_sequences: int  # sequences of TYPICAL_TOKENS tokens


@dataclass(frozen=True)
class GpuPlan:
    """One GPU and what it would hold."""

    node: str
    index: int
    name: str
    total_bytes: int
    free_bytes: int  # now
    planned_bytes: int
    instances: tuple[Role, ...]


@dataclass(frozen=True)
class Plan:
    """The resources that a configuration uses on given machines."""

    model: str
    architecture: str
    num_parameters: int
    dtype: str
    max_model_len: int
    default_sampling: DefaultSampling
    device: DeviceKind
    why_device: str
    block_size: int
    weights_bytes: int
    kv_bytes_per_token: int
    gpus: tuple[GpuPlan, ...]  # that instances may use
    pools: tuple[PoolPlan, ...]
    findings: tuple[Finding, ...]

    def check(self, *, more_may_come: bool = False) -> None:
        """Raises ConfigError or CapacityError with all findings, a line each; returns where there are none.
        While more machines may come, those that are there may be too small."""
        findings = [one for one in self.findings if not (more_may_come and one.error is CapacityError)]
        if findings:
            kinds = {finding.error for finding in findings}
            error = ConfigError if ConfigError in kinds else CapacityError
            raise error("\n".join(finding.message for finding in findings))


def plan(config: ClusterConfig, nodes: Sequence[Node] | None = None, *, more_may_come: bool = False) -> Plan:
    """The plan for `nodes`, or for this machine. Raises CheckpointError for a model that cannot be served at
    all."""
    checkpoint = open_checkpoint(resolve_model_path(config.model.path))
    return make_plan(
        config,
        checkpoint,
        (probe_node(),) if nodes is None else nodes,
        more_may_come=more_may_come,
        defaults=default_sampling(config.model),
    )


def planned_layout(model: ModelConfig, planned: Plan, wire: Literal["raw", "int8"]) -> KVLayout:
    """Returns the layout of the KV of planned instances, which have no fingerprint of weights yet."""
    return KVLayout(
        model.num_layers, model.num_kv_heads, model.head_dim, planned.dtype, planned.block_size, "", wire
    )


def make_plan(
    config: ClusterConfig,
    checkpoint: Checkpoint,
    nodes: Sequence[Node],
    *,
    more_may_come: bool = False,
    defaults: DefaultSampling = NO_DEFAULTS,
) -> Plan:
    """The arithmetic of `plan`, from values alone. While more machines may come, `kv_cache_bytes: auto` is
    what the first of `nodes` has for as many instances as its cores could ever be given, so that it does not
    depend on who comes when."""
    device = resolve_device(config, nodes)
    sizes = _Sizes(config, checkpoint, device)
    packing = Packing(
        [sizes.demand(role, pool) for role, pool in config.pools.items() for _ in range(pool.num_instances)],
        nodes,
    )
    left = packing.gpu_kv_bytes(GPU_MEMORY_FRACTION) if device == "cuda" else {}
    auto_kv_bytes = (
        packing.auto_kv_bytes(AUTO_MEMORY_FRACTION, fill_first=more_may_come) if device == "cpu" else None
    )
    pools = tuple(
        sizes.pool_plan(role, pool, left.get(role, auto_kv_bytes)) for role, pool in config.pools.items()
    )
    kv_bytes = {pool.role: pool.kv_cache_bytes for pool in pools}
    if device == "cuda":
        memory_findings = packing.gpu_memory_findings(kv_bytes, GPU_MEMORY_FRACTION)
    else:
        memory_findings = packing.memory_findings(kv_bytes)
    return Plan(
        model=config.model.name,
        architecture=checkpoint.config.architecture,
        num_parameters=checkpoint.num_parameters,
        dtype=sizes.layout.dtype,
        max_model_len=sizes.max_model_len,
        default_sampling=defaults,
        device=device,
        why_device=why_device(config, nodes),
        block_size=sizes.layout.block_size,
        weights_bytes=sizes.weights_bytes,
        kv_bytes_per_token=sizes.layout.bytes_per_token,
        gpus=tuple(_gpu_plans(packing, kv_bytes)) if device == "cuda" else (),
        pools=pools,
        findings=(
            *sizes.findings(),
            *device_findings(config, device, nodes),
            *packing.core_findings(),
            *memory_findings,
        ),
    )


def _gpu_plans(packing: Packing, kv_bytes: Mapping[Role, int]) -> Iterator[GpuPlan]:
    for load in packing.loads:
        for device, demands in zip(load.node.usable_devices, load.on_gpus, strict=True):
            yield GpuPlan(
                node=load.node.name,
                index=device.index,
                name=device.name,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
                planned_bytes=sum(demand.fixed_bytes + kv_bytes[demand.role] for demand in demands),
                instances=tuple(demand.role for demand in demands),
            )


class _Sizes:
    """Bytes and blocks of one model under one configuration, whatever the machine."""

    def __init__(self, config: ClusterConfig, checkpoint: Checkpoint, device: DeviceKind) -> None:
        self._config = config
        self._on_gpu = device == "cuda"
        self._model = model = checkpoint.config
        dtype = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
        block_size = config.kv.num_tokens_per_block(device)
        self.layout = KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, dtype, block_size, "")
        self._item_bytes = 4 if dtype == "float32" else 2
        self.weights_bytes = checkpoint.num_parameters * self._item_bytes
        asked = config.model.max_model_len
        self.max_model_len = model.max_position_embeddings if asked == "auto" else asked

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_size)

    def _block_bytes(self, pool: PoolSection) -> int:
        """Memory of one block in all ranks of an instance together."""
        num_copies = num_kv_copies(self._model, num_sharing(self._model, pool))
        return num_copies * self.layout.block_size * self.layout.bytes_per_token

    def _max_len_bytes(self, pool: PoolSection) -> int:
        return self._blocks(self.max_model_len) * self._block_bytes(pool)

    def _rank_weights_bytes(self, pool: PoolSection) -> int:
        num_ranks = num_sharing(self._model, pool)
        if num_ranks == 1:
            return self.weights_bytes
        return num_parameters_of(rank_model(self._model, num_ranks)) * self._item_bytes

    def demand(self, role: Role, pool: PoolSection) -> Demand:
        if self._on_gpu:
            share = pool.gpu_share
            return Demand(
                role,
                pool.num_cpus,
                pool.num_host_cores,
                self.fixed_bytes(pool),
                self.explicit_kv_bytes(pool),
                share,
            )
        num_cores = pool.devices_per_instance
        return Demand(role, pool.num_cpus, num_cores, self.fixed_bytes(pool), self.explicit_kv_bytes(pool))

    def fixed_bytes(self, pool: PoolSection) -> int:
        """Memory of one instance beside its KV cache, of all its ranks: activations, logits with room to sort
        them on rank 0, the rope's table."""
        num_ranks = num_sharing(self._model, pool)
        model = rank_model(self._model, num_ranks)
        # CPU kernels lay out the output's matrix in their own way
        is_copied = model.tie_word_embeddings and not self._on_gpu
        # both are filled up
        panels, depth = -(-model.vocab_size // 32), -(-model.hidden_size // 32)
        packed_head = panels * 32 * depth * 32 if is_copied else 0
        per_token = 3 * model.hidden_size + model.q_size + 2 * model.kv_size + 2 * model.intermediate_size
        activations = (packed_head + pool.max_batch_tokens * per_token) * self._item_bytes
        runtime_bytes = GPU_RUNTIME_BYTES if self._on_gpu else RUNTIME_BYTES
        logits = pool.max_batch_size * self._model.vocab_size * 12
        rope = ROPE_COPIES * self.max_model_len * model.head_dim * 4
        rank_bytes = self._rank_weights_bytes(pool) + activations + rope + runtime_bytes
        shared_bytes = SHARED_BYTES if num_ranks > 1 else 0
        return num_ranks * (rank_bytes + self._link_bytes(pool)) + logits + shared_bytes

    def _link_bytes(self, pool: PoolSection) -> int:
        """Memory of a rank's links to the ranks of the other pools that the runtime's does not include, as
        large as between hosts."""
        num_peers = sum(
            other.num_instances * max(1, other.tensor_parallel // pool.tensor_parallel)
            for _, other in self._config.pools.items()
            if other is not pool
        )
        num_links = min(num_peers, TransferConfig.max_links)
        ring_bytes = TransferConfig.ring_slots * CHUNK_BYTES["nccl" if self._on_gpu else "gloo"].largest
        return max(0, num_links - FIRST_LINKS) * ring_bytes

    def explicit_kv_bytes(self, pool: PoolSection) -> int | None:
        return None if pool.kv_cache_bytes == "auto" else pool.kv_cache_bytes

    def _kv_bytes(self, pool: PoolSection, auto_kv_bytes: int | None) -> int:
        """The configured bytes, or else a share of memory: one sequence at least, a full batch of longest
        ones at most."""
        if pool.kv_cache_bytes != "auto":
            return pool.kv_cache_bytes
        if self._on_gpu:  # all that is left keeps prefixes
            return max(self._max_len_bytes(pool), auto_kv_bytes or 0)
        enough = pool.max_batch_size * self._max_len_bytes(pool)
        share = AUTO_KV_MAX_BYTES if auto_kv_bytes is None else min(auto_kv_bytes, AUTO_KV_MAX_BYTES)
        return max(self._max_len_bytes(pool), min(share, enough))

    def pool_plan(self, role: Role, pool: PoolSection, auto_kv_bytes: int | None) -> PoolPlan:
        num_blocks = self._kv_bytes(pool, auto_kv_bytes) // self._block_bytes(pool)
        kv_cache_bytes = num_blocks * self._block_bytes(pool)
        return PoolPlan(
            role=role,
            instances=pool.num_instances,
            num_cpus=pool.num_cpus,
            num_threads=pool.num_threads,
            num_ranks=pool.tensor_parallel,
            num_kv_copies=num_kv_copies(self._model, num_sharing(self._model, pool)),
            rank_weights_bytes=self._rank_weights_bytes(pool),
            gpu_share=pool.gpu_share if self._on_gpu else None,
            instance_bytes=self.fixed_bytes(pool) + kv_cache_bytes,
            kv_cache_bytes=kv_cache_bytes,
            num_blocks=num_blocks,
            is_measured=self._on_gpu and pool.kv_cache_bytes == "auto",
            num_max_len_sequences=num_blocks // self._blocks(self.max_model_len),
            num_typical_sequences=num_blocks // self._blocks(TYPICAL_TOKENS),
        )

    def findings(self) -> Iterator[Finding]:
        limit = self._model.max_position_embeddings
        if self.max_model_len > limit:
            message = (
                f"model.max_model_len: got {self.max_model_len}, expected at most {limit}, as the model was"
                " made for"
            )
            yield Finding(ConfigError, message)
        for role, pool in self._config.pools.items():
            yield from rank_findings(role, pool, self._model)
            num_bytes, least = self.explicit_kv_bytes(pool), self._max_len_bytes(pool)
            if num_bytes is not None and num_bytes < least:
                num_tokens = num_bytes // self._block_bytes(pool) * self.layout.block_size
                yield Finding(
                    ConfigError,
                    f"pools.{role.value}.kv_cache_bytes: {format_size(num_bytes)} holds {num_tokens} tokens,"
                    f" expected at least {least} bytes ({format_size(least)}) for"
                    f" one sequence of model.max_model_len ({self.max_model_len}); raise it, or lower"
                    " model.max_model_len",
                )
