"""Loads a checkpoint's tensors one by one, as the weights loader asks for them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import CheckpointError
from .checkpoint import Checkpoint


class TensorReader:
    """`reader(name, shape)` is the tensor of that name, copied into memory of its own on `device` in `dtype`.

    Files are opened when first needed and stay open as long as the reader lives.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._files: dict[Path, Any] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises CheckpointError where the tensor cannot be read or is not of `shape`."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {name} is missing")
        try:
            if info.file not in self._files:
                self._files[info.file] = safe_open(info.file, framework="pt", device=str(self._device))
            tensor: torch.Tensor = self._files[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{info.file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor.to(dtype=self._dtype, copy=self._device.type == "cpu")  # a file of the host's is mapped
