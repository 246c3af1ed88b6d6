"""Loads a checkpoint's tensors one by one, as the weights loader asks for them."""

import weakref
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..core.checkpoint_files import open_regular, stamp_of
from ..core.errors import CheckpointError
from .checkpoint import Checkpoint
from .gguf_tensors import GgufInfo
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
        if isinstance(info, GgufInfo):
            return _dequantised(name, info, shape, self._dtype).to(self._device)
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


def _dequantised(name: str, info: GgufInfo, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of a GGUF file on the host, its rows in the order of a Hugging Face checkpoint. Raises
    CheckpointError."""
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: tensor {name} has shape {info.shape}, expected {shape}")
    tensor = torch.empty(info.num_elements // shape[-1], shape[-1], dtype=dtype)  # [rows, columns]
    try:
        with open_regular(info.file) as stream:
            for first, rows in info.slices(stream):
                tensor[first : first + len(rows)] = torch.from_numpy(rows)
            _check(stream, info)
    except (OSError, ValueError) as error:  # ValueError: cut off meanwhile
        raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
    tensor = tensor.view(shape)
    if not info.num_interleaved_heads:
        return tensor
    # ggml rotates neighbouring elements of a head, transformers one of each half
    pairs = tensor.view(info.num_interleaved_heads, -1, 2, *shape[1:])  # [heads, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(shape)


def _check(stream: BinaryIO, info: TensorInfo) -> None:
    """Raises CheckpointError."""
    if stamp_of(stream) != info.stamp:
        raise CheckpointError(
            f"{info.file}: replaced or written to since it was checked, expected the same file; start again"
        )
