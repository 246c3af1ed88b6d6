"""Everything one worker computes with: model, kernels, KV memory and its bookkeeping, put together once at start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..core.errors import CapacityError, ConfigError
from ..core.messages import KVLayout
from ..kernels import KernelRequirements, Kernels, load_kernels
from .block_pool import BlockPool
from .checkpoint import Checkpoint, fingerprint, open_checkpoint
from .kv_cache import KVCache
from .kv_manager import KVManager
from .model import Model
from .model_config import ModelConfig
from .runner import ModelRunner
from .tensor_reader import TensorReader
from .weights import load_weights


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a checkpoint is to be run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's
    device: Literal["cpu", "cuda"] = "cpu"
    block_size: int = 16
    num_blocks: int | None  # None, on a GPU: as many as its memory leaves
    memory_fraction: float = 0.9  # of the GPU's memory, that the engine may fill
    max_model_len: int | None = None  # None: as many positions as the model was made for
    max_batch_size: int = 256
    max_batch_tokens: int = 2048
    kernels: Literal["auto", "native", "torch", "triton"] = "auto"
    num_threads: int = 1


@dataclass(frozen=True)
class Engine:
    """Used by one thread, save for `cache`: a transfer's thread may gather and scatter blocks that no step touches."""

    config: ModelConfig
    kernels: Kernels
    pool: BlockPool
    kv: KVManager
    cache: KVCache
    runner: ModelRunner

    @property
    def layout(self) -> KVLayout:
        return self.cache.layout

    @classmethod
    def open(cls, path: Path, options: EngineOptions, on_progress: Callable[[float], None] = lambda _: None) -> "Engine":
        """Load the checkpoint in `path`; `on_progress` is told the fraction loaded, up to 1.0.

        Raises CheckpointError, ConfigError for options that do not fit the model, CapacityError for too little memory.
        """
        if options.device != "cpu" or options.num_blocks is None:
            raise ConfigError(f"device: got {options.device}, expected cpu, and a number of blocks")
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        layout = _layout(checkpoint, options)
        max_model_len = _max_model_len(config, options)
        dtype = getattr(torch, layout.dtype)
        kernels = _load_kernels(layout, options)
        cache = _allocate(layout, options.num_blocks, kernels)
        with torch.inference_mode():
            weights = load_weights(config, TensorReader(checkpoint, dtype), kernels, on_progress)
        pool = BlockPool(options.num_blocks, options.block_size)
        runner = ModelRunner(Model(config, weights, kernels, max_model_len), cache, kernels, max_model_len)
        return cls(config, kernels, pool, KVManager(pool, max_model_len), cache, runner)


def _layout(checkpoint: Checkpoint, options: EngineOptions) -> KVLayout:
    config = checkpoint.config
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=checkpoint.dtype if options.dtype == "auto" else options.dtype,
        block_size=options.block_size,
        model_fingerprint=fingerprint(checkpoint.path),
    )


def _max_model_len(config: ModelConfig, options: EngineOptions) -> int:
    limit = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ConfigError(f"model.max_model_len: {options.max_model_len} is more than the model's {limit} positions")
    return options.max_model_len or limit


def _load_kernels(layout: KVLayout, options: EngineOptions) -> Kernels:
    try:
        requirements = KernelRequirements(getattr(torch, layout.dtype), layout.head_dim, layout.block_size)
        return load_kernels("cpu", requirements, options.kernels, options.num_threads)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _allocate(layout: KVLayout, num_blocks: int, kernels: Kernels) -> KVCache:
    try:
        return KVCache(layout, num_blocks, kernels)
    except RuntimeError as error:  # torch's out-of-memory on CPU
        num_bytes = num_blocks * layout.block_size * layout.bytes_per_token
        raise CapacityError(f"no memory for a KV cache of {num_bytes:,} bytes ({num_blocks} blocks): {error}") from error
