"""Engines configured for a GPU, on a test double of that device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from pdserve.engine import engine as engine_module
from pdserve.engine.checkpoint import open_checkpoint
from pdserve.engine.device import Device
from pdserve.engine.engine import Engine, EngineOptions, layout_of
from pdserve.engine.tensor_reader import TensorReader
from pdserve.engine.weights import ReadTensor
from pdserve.kernels.triton.kernels import TritonKernels


def open_device_engine(
    path: Path, options: EngineOptions, device: Device, read: ReadTensor | None = None
) -> Engine:
    """Like `Engine.open` on a GPU; `options.device` is "cuda". Weights are the checkpoint's, or those that
    `read` returns."""
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint, options)
    read = read or TensorReader(checkpoint, getattr(torch, layout.dtype))
    torch.set_num_threads(1)
    with patch.object(
        engine_module,
        "load_kernels",
        lambda _device, requirements, _choice, _threads: TritonKernels(requirements),
    ):
        return Engine.build(checkpoint.config, layout, read, options, device)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Fills unwritten memory with NaN, so that it shows wherever it gets into a result."""
    # with torch.utils.deterministic.fill_uninitialized_memory, which is the default
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
