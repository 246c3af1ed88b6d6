"""All components that one worker computes with: model, kernels, KV memory and its bookkeeping, assembled once
at start."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..core.devices import KernelChoice
from ..core.errors import CapacityError, ConfigError
from ..core.messages import KVLayout
from ..kernels import KernelRequirements, Kernels, load_kernels
from .batch import StepRunner
from .block_pool import BlockPool
from .checkpoint import Checkpoint, fingerprint, open_checkpoint
from .device import CudaDevice, Device, HostDevice
from .kv_cache import KVCache
from .kv_manager import KVManager
from .model import Model
from .model_config import ModelConfig
from .parallel.agreement import agree
from .parallel.collectives import ONE_RANK
from .parallel.group import RankGroup
from .parallel.shard import WHOLE, Shard
from .runner import ModelRunner
from .tensor_reader import TensorReader
from .weights import ReadTensor, load_weights

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options for running a checkpoint."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's
    device: Literal["cpu", "cuda"] = "cpu"
    block_size: int = 16
    num_blocks: int | None = None  # None: as many as the GPU has room for; on CPU a number is needed
    memory_fraction: float = 0.9  # fraction of the GPU's memory that this process may use in all
    max_model_len: int | None = None  # None: as many positions as the model was made for
    max_batch_size: int = 256
    max_batch_tokens: int = 2048
    kernels: KernelChoice = "auto"
    num_threads: int = 1
    wire: Literal["raw", "int8"] = "raw"  # format of KV between workers


@dataclass(frozen=True)
class Engine:
    """Used by one thread, except `cache`: a transfer's thread may gather and scatter blocks that no step
    touches."""

    config: ModelConfig
    kernels: Kernels
    pool: BlockPool
    kv: KVManager
    cache: KVCache
    runner: StepRunner

    @property
    def layout(self) -> KVLayout:
        return self.cache.layout

    @classmethod
    def open(
        cls,
        path: Path,
        options: EngineOptions,
        on_progress: Progress = lambda _: None,
        group: RankGroup | None = None,
    ) -> "Engine":
        """Loads the checkpoint in `path`, or rank 0's share of it while the group's other ranks load theirs
        (`Follower.open`); `on_progress` is called with the fraction read, up to 1.0.

        Raises CheckpointError, ConfigError for options that do not fit the model, CapacityError for too
        little memory, RankLost where another rank does not start."""
        with nullcontext() if group is None else group.start():
            checkpoint = open_checkpoint(path)
            if group is None:
                layout = layout_of(checkpoint, options)
            else:
                layout = agreed_layout(checkpoint, options, group)
            device, dtype = _open_device(options), getattr(torch, layout.dtype)
            read = TensorReader(checkpoint, dtype, device.torch_device, on_progress, _shard_of(group))
            engine = cls.build(checkpoint.config, layout, read, options, device, group)
        on_progress(1.0)
        return engine

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        layout: KVLayout,
        read: ReadTensor,
        options: EngineOptions,
        device: Device,
        group: RankGroup | None = None,
    ) -> "Engine":
        """Like `open`, for weights from any source; `read` returns them on the device."""
        max_model_len = _max_model_len(config, options)
        if options.device == "cpu":
            kernels, cache, model = load_on_host(config, layout, read, options, group)
            begin_step = None if group is None else group.begin_step
            runner: StepRunner = ModelRunner(model, cache, kernels, max_model_len, begin_step)
        else:
            kernels = _load_kernels(layout, options)
            with torch.inference_mode():
                model = Model(config, load_weights(config, read, kernels), kernels, max_model_len)
                cache, runner = _on_gpu(device, model, layout, kernels, options, max_model_len)
        pool = BlockPool(cache.num_blocks, layout.block_size)
        return cls(config, kernels, pool, KVManager(pool, max_model_len), cache, runner)


@torch.inference_mode()
def load_on_host(
    config: ModelConfig,
    layout: KVLayout,
    read: ReadTensor,
    options: EngineOptions,
    group: RankGroup | None = None,
) -> tuple[Kernels, KVCache, Model]:
    """Returns a model on the CPU, or this rank's share of it, with its KV cache. Raises as `Engine.open`
    does."""
    max_model_len = _max_model_len(config, options)
    kernels = _load_kernels(layout, options)
    # before the weights: it may not fit
    cache = _allocate(layout, _required(options.num_blocks), kernels, HostDevice())
    weights = load_weights(_shard_of(group).of(config), read, kernels)
    return kernels, cache, Model(config, weights, kernels, max_model_len, group or ONE_RANK)


def _shard_of(group: RankGroup | None) -> Shard:
    return WHOLE if group is None else group.shard


def _open_device(options: EngineOptions) -> Device:
    if options.device == "cpu":
        return HostDevice()
    if not torch.cuda.is_available():
        raise ConfigError("device: got cuda, but torch finds no GPU here; expected cpu or auto")
    return CudaDevice()


def _on_gpu(
    device: Device,
    model: Model,
    layout: KVLayout,
    kernels: Kernels,
    options: EngineOptions,
    max_model_len: int,
) -> tuple[KVCache, StepRunner]:
    from ..kernels.triton.kernels import TritonKernels  # only torch's CUDA builds include triton
    from .on_gpu.decode_graphs import ladder
    from .on_gpu.kv_budget import num_blocks_that_fit
    from .on_gpu.runner import DeviceRunner

    assert isinstance(kernels, TritonKernels)
    num_blocks = options.num_blocks
    if num_blocks is None:
        num_blocks = num_blocks_that_fit(
            device,
            model,
            layout,
            kernels,
            memory_fraction=options.memory_fraction,
            max_model_len=max_model_len,
            max_batch_size=options.max_batch_size,
            max_batch_tokens=options.max_batch_tokens,
            num_graphs=len(ladder(options.max_batch_size)),
        )
    cache = _allocate(layout, num_blocks, kernels, device)
    limits = {"max_batch_size": options.max_batch_size, "max_model_len": max_model_len}
    return cache, DeviceRunner(device, model, cache, kernels, **limits)


def layout_of(checkpoint: Checkpoint, options: EngineOptions, shard: Shard = WHOLE) -> KVLayout:
    """Returns the layout of a model's KV, or of a rank's share of it. Raises ConfigError for a model that the
    ranks cannot share."""
    config = shard.of(checkpoint.config)
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=checkpoint.dtype if options.dtype == "auto" else options.dtype,
        block_size=options.block_size,
        model_fingerprint=fingerprint(checkpoint.path),
        wire=options.wire,
    )


def agreed_layout(checkpoint: Checkpoint, options: EngineOptions, group: RankGroup) -> KVLayout:
    """Returns the layout of this rank's share, when all ranks have come to load the same.

    Raises ConfigError for what they cannot share or do not agree on, RankLost where one does not come."""
    if options.device != "cpu":
        raise ConfigError(
            f"tensor_parallel: got {group.shard.num_ranks} on {options.device}, expected 1: ranks share the"
            " work on the CPU alone"
        )
    layout = layout_of(checkpoint, options, group.shard)
    agree(group, checkpoint, layout, options.num_blocks, options.max_model_len, options.kernels)
    return layout


def _max_model_len(config: ModelConfig, options: EngineOptions) -> int:
    limit = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ConfigError(
            f"model.max_model_len: {options.max_model_len} is more than the model's {limit} positions"
        )
    return options.max_model_len or limit


def _load_kernels(layout: KVLayout, options: EngineOptions) -> Kernels:
    try:
        requirements = KernelRequirements(getattr(torch, layout.dtype), layout.head_dim, layout.block_size)
        return load_kernels(options.device, requirements, options.kernels, options.num_threads)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _required(num_blocks: int | None) -> int:
    if num_blocks is None:
        raise ConfigError("num_blocks: got None, expected a number: only a GPU's memory is measured")
    return num_blocks


def _allocate(layout: KVLayout, num_blocks: int, kernels: Kernels, device: Device) -> KVCache:
    try:
        return KVCache(layout, num_blocks, kernels, device)
    except RuntimeError as error:  # torch's out-of-memory
        num_bytes = num_blocks * layout.block_size * layout.bytes_per_token
        raise CapacityError(
            f"no memory for a KV cache of {num_bytes:,} bytes ({num_blocks} blocks): {error}"
        ) from error
