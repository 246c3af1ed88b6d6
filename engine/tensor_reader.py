"""Loads a checkpoint's tensors one by one, as the weights loader asks for them."""

import weakref
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..core.checkpoint_files import open_regular, stamp_of
from ..core.errors import CheckpointError
from .checkpoint import Checkpoint
from .safetensors_header import TensorInfo


class TensorReader:
    """`reader(name, shape)` is the tensor of that name, copied into memory of its own on `device` in `dtype`.

    Files are opened once, when first needed, and stay open as long as the reader exists. They must be the
    unchanged files whose headers were checked; others are refused."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device
        self._files: dict[Path, tuple[BinaryIO, Any]] = {}  # with safetensors' view of each

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises CheckpointError where the tensor cannot be read or is not of `shape`."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {name} is missing")
        try:
            tensor: torch.Tensor = self._opened(info).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor.to(dtype=self._dtype, copy=self._device.type == "cpu")  # a file of the host's is mapped

    def _opened(self, info: TensorInfo) -> Any:
        """Opens the file of a tensor. safetensors opens it by a name, which may meanwhile refer to another
        file; our descriptor's name does not."""
        if info.file not in self._files:
            stream = open_regular(info.file)
            weakref.finalize(self, stream.close)
            _check(stream, info)
            name = f"/proc/self/fd/{stream.fileno()}"
            self._files[info.file] = stream, safe_open(name, framework="pt", device=str(self._device))
        stream, tensors = self._files[info.file]
        _check(stream, info)  # it is mapped: to read where it was cut off would end this process
        return tensors


def _check(stream: BinaryIO, info: TensorInfo) -> None:
    """Raises CheckpointError."""
    if stamp_of(stream) != info.stamp:
        raise CheckpointError(
            f"{info.file}: replaced or written to since it was checked, expected the same file; start again"
        )
