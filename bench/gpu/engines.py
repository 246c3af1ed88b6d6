"""Engines with random weights, made where they compute: no checkpoint is written or read."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from pdserve.core.messages import KVLayout
from pdserve.engine import engine as engine_module
from pdserve.engine.checkpoint import open_checkpoint
from pdserve.engine.device import CudaDevice, Device, HostDevice
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.tensor_reader import TensorReader
from pdserve.kernels.triton.kernels import TritonKernels

from .interpreter import patch_language_once
from .shapes import Shape

BLOCK_SIZE = 64  # what `auto` is on a GPU
_HOST_MEMORY_BYTES = 1536 << 20  # where the blocks that fit are measured: links take 512 MiB of it


class RandomReader:
    """`read(name, shape)` of a model whose activations stay of a size: norms of ones, and all else drawn by
    its name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(std=shape[-1] ** -0.5, generator=generator)


def layout_of(shape: Shape, options: EngineOptions) -> KVLayout:
    config = shape.config
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="bfloat16" if options.dtype == "auto" else options.dtype,
        block_size=options.block_size,
        model_fingerprint=f"random {shape.name}",
    )


def open_random_engine(shape: Shape, options: EngineOptions) -> Engine:
    """An engine of that shape on the device that the options name."""
    device, layout = device_of(options), layout_of(shape, options)
    read = RandomReader(getattr(torch, layout.dtype), device.torch_device)
    return Engine.build(shape.config, layout, read, options, device)


def open_checkpoint_engine(path: Path, options: EngineOptions) -> Engine:
    """Opens a checkpoint as a worker does; on the host under `triton_on_host`."""
    if torch.cuda.is_available():
        return Engine.open(path, options)
    checkpoint, device = open_checkpoint(path), HostDevice(_HOST_MEMORY_BYTES)
    layout = engine_module.layout_of(checkpoint, options)
    read = TensorReader(checkpoint, getattr(torch, layout.dtype), device.torch_device)
    return Engine.build(checkpoint.config, layout, read, options, device)


def device_of(options: EngineOptions) -> Device:
    return CudaDevice() if options.device == "cuda" and torch.cuda.is_available() else HostDevice()


def options_for(
    device: str, *, num_tokens: int, max_model_len: int, max_batch_size: int, max_batch_tokens: int
) -> EngineOptions:
    """Options with room for sequences of `num_tokens` tokens together."""
    return EngineOptions(
        device="cuda" if device == "cuda" else "cpu",
        block_size=BLOCK_SIZE,
        num_blocks=-(-num_tokens // BLOCK_SIZE) + 2 * max_batch_size,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
    )


@contextmanager
def triton_on_host() -> Iterator[None]:
    """Engines for "cuda" compute in Triton's interpreter meanwhile, on the processor."""
    patch_language_once()
    with patch.object(
        engine_module,
        "load_kernels",
        lambda _device, requirements, _choice, _threads: TritonKernels(requirements),
    ):
        yield
