"""Loads a checkpoint's tensors one by one, as the weights loader asks for them."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..core.checkpoint_files import open_regular, stamp_of
from ..core.errors import CheckpointError
from .checkpoint import Checkpoint
from .gguf_tensors import GgufInfo
from .safetensors_header import TensorInfo

SLICE_ELEMENTS = 1 << 24  # copied at once


class TensorReader:
    """`reader(name, shape)` is the tensor of that name, copied into memory of its own on `device` in `dtype`.
    `on_progress` is called with the fraction of the checkpoint that has been read, tensor by tensor, large
    ones slice by slice: a slow disk is still seen to move.

    Files are opened once, when first needed, and stay open as long as the reader exists. They must be the
    unchanged files whose headers were checked; others are refused."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | None = None,
        on_progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device
        self._on_progress = on_progress
        self._num_read = 0  # elements
        self._files: dict[Path, tuple[BinaryIO, Any]] = {}  # with safetensors' view of each

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises CheckpointError where the tensor cannot be read or is not of `shape`."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {name} is missing")
        if isinstance(info, GgufInfo):
            return self._dequantised(name, info, shape).to(self._device)
        try:
            tensor: torch.Tensor = self._opened(info).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if self._device.type != "cpu":  # it has been read
            self._advance(tensor.numel())
            return tensor.to(dtype=self._dtype)
        copied = torch.empty(shape, dtype=self._dtype)  # the file is mapped: it is read while it is copied
        flat, source = copied.view(-1), tensor.view(-1)
        for first in range(0, len(flat), SLICE_ELEMENTS):
            flat[first : first + SLICE_ELEMENTS] = source[first : first + SLICE_ELEMENTS]
            self._advance(len(source[first : first + SLICE_ELEMENTS]))
        return copied

    def _advance(self, num_elements: int) -> None:
        self._num_read += num_elements
        self._on_progress(min(1.0, self._num_read / self._checkpoint.num_parameters))

    def _dequantised(self, name: str, info: GgufInfo, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns a tensor of a GGUF file on the host, its rows in the order of a Hugging Face checkpoint.
        Raises CheckpointError."""
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name} has shape {info.shape}, expected {shape}")
        tensor = torch.empty(info.num_elements // shape[-1], shape[-1], dtype=self._dtype)  # [rows, columns]
        try:
            with open_regular(info.file) as stream:
                for first, rows in info.slices(stream):
                    tensor[first : first + len(rows)] = torch.from_numpy(rows)
                    self._advance(rows.size)
                _check(stream, info)
        except (OSError, ValueError) as error:  # ValueError: cut off meanwhile
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        tensor = tensor.view(shape)
        if not info.num_interleaved_heads:
            return tensor
        # ggml rotates neighbouring elements of a head, transformers one of each half
        pairs = tensor.view(info.num_interleaved_heads, -1, 2, *shape[1:])  # [heads, head_dim / 2, 2, ...]
        return pairs.transpose(1, 2).reshape(shape)

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
