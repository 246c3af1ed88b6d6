"""Loads a checkpoint's tensors one by one, as the weights loader asks for them."""

import math
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
from .parallel.shard import WHOLE, Shard
from .safetensors_header import TensorInfo
from .tensor_names import expected_tensors

SLICE_ELEMENTS = 1 << 24  # copied at once


class TensorReader:
    """`reader(name, shape)` is the part of the tensor of that name that belongs to `shard`, copied into
    memory of its own on `device` in `dtype`. Other parts are read only where they lie between its columns.
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
        shard: Shard = WHOLE,
    ) -> None:
        """Raises ConfigError for a model that does not divide as `shard` says."""
        self._checkpoint = checkpoint
        self._shard = shard
        self._num_elements = sum(map(math.prod, expected_tensors(shard.of(checkpoint.config)).values()))
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device
        self._on_progress = on_progress
        self._num_read = 0  # elements
        self._files: dict[Path, tuple[BinaryIO, Any]] = {}  # with safetensors' view of each

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises CheckpointError where the tensor cannot be read or its part is not of `shape`."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {name} is missing")
        spans = [range(size) for size in info.shape]
        part = self._shard.part(name, self._checkpoint.config)
        if part is not None and not part.span:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        if part is not None:
            spans[part.dim] = part.span
        if tuple(map(len, spans)) != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {tuple(map(len, spans))}, expected {shape}"
            )
        if isinstance(info, GgufInfo):
            return self._dequantised(name, info, spans).to(self._device)
        cut = tuple(slice(span.start, span.stop) for span in spans)
        try:
            if self._device.type != "cpu":
                part_there: torch.Tensor = self._opened(info).get_slice(name)[cut]
                self._advance(part_there.numel())
                return part_there.to(dtype=self._dtype, device=self._device)
            source: torch.Tensor = self._opened(info).get_tensor(name)[cut]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        copied = torch.empty(shape, dtype=self._dtype)  # the file is mapped: it is read while it is copied
        step = max(1, SLICE_ELEMENTS // math.prod(shape[1:]))
        for first in range(0, len(copied), step):
            copied[first : first + step] = source[first : first + step]
            self._advance(copied[first : first + step].numel())
        return copied

    def _advance(self, num_elements: int) -> None:
        self._num_read += num_elements
        self._on_progress(min(1.0, self._num_read / self._num_elements))

    def _dequantised(self, name: str, info: GgufInfo, spans: list[range]) -> torch.Tensor:
        """Returns a part of a tensor of a GGUF file on the host, its rows in the order of a Hugging Face
        checkpoint. Raises CheckpointError."""
        shape = tuple(map(len, spans))
        row_span = spans[0] if len(spans) > 1 else range(1)
        tensor = torch.empty(len(row_span), shape[-1], dtype=self._dtype)  # [rows, columns]
        try:
            with open_regular(info.file) as stream:
                for first, rows in info.slices(stream, row_span, spans[-1]):
                    tensor[first : first + len(rows)] = torch.from_numpy(rows)
                    self._advance(rows.size)
                _check(stream, info)
        except (OSError, ValueError) as error:  # ValueError: cut off meanwhile
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        tensor = tensor.view(shape)
        if not info.num_interleaved_heads:
            return tensor
        # ggml rotates neighbouring elements of a head, transformers one of each half
        num_heads = info.num_interleaved_heads * len(spans[0]) // info.shape[0]
        pairs = tensor.view(num_heads, -1, 2, *shape[1:])  # [heads, head_dim / 2, 2, ...]
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
