"""The header of a safetensors file: what is in it, without loading any of it. No torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header announces it."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file` by name. Raises CheckpointError where it is missing, truncated or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES + length or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: truncated or not a safetensors file: its header does not fit its size")
            header = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {name: _tensor(file, name, entry, size - _LENGTH_BYTES - length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: corrupt: its header is not one of safetensors") from None


def _tensor(file: Path, name: str, entry: dict[str, Any], data_bytes: int) -> TensorInfo:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    info = TensorInfo(file, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
    if end > data_bytes:
        raise CheckpointError(
            f"{file}: truncated: tensor {name} ends at byte {end} of the data, the file has {data_bytes} bytes of it"
        )
    item_bytes = _ITEM_BYTES.get(info.dtype)
    if begin < 0 or (item_bytes is not None and end - begin != info.num_elements * item_bytes):
        raise CheckpointError(f"{file}: corrupt: tensor {name} of shape {info.shape} takes {end - begin} bytes")
    return info
