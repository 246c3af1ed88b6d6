"""The headers of a checkpoint's safetensors files: lists their tensors without loading any. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from ..core.checkpoint_files import (
    MAX_NAME_CHARS,
    FileStamp,
    check_size,
    is_name,
    open_regular,
    parse_json,
    shown,
    stamp_of,
)
from ..core.errors import CheckpointError

# of one file; 1,024 layers of our models come to 3 MiB. Parsed, it takes up to 320 MiB
MAX_HEADER_BYTES = 16 << 20
MAX_HEADERS_BYTES = 64 << 20  # of all files of a checkpoint
MAX_TENSORS = 1 << 16  # of a checkpoint: a few times those of 1,024 layers
_LENGTH_BYTES = 8
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct):
    """A tensor in the header; bounded before anything is computed from it, or repeated in a message."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Offset, _Offset]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header announces it."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    stamp: FileStamp  # of the file when the header was read

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class HeaderReader:
    """Reads the headers of one checkpoint's files, within bounds over all of them."""

    def __init__(self) -> None:
        self._bytes_left = MAX_HEADERS_BYTES
        self._tensors_left = MAX_TENSORS

    def read(self, file: Path) -> dict[str, TensorInfo]:
        """Returns the tensors of `file` by name. Raises CheckpointError where it is missing, truncated or not
        safetensors."""
        with open_regular(file) as stream:
            stamp = stamp_of(stream)
            size = stamp.num_bytes
            try:
                length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
                if size < _LENGTH_BYTES + length:
                    raise CheckpointError(
                        f"{file}: truncated or not a safetensors file: its header does not fit its size"
                    )
                check_size(Path(f"{file}: header"), length, min(MAX_HEADER_BYTES, self._bytes_left))
                header = stream.read(length)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        self._bytes_left -= length
        entries = _entries(file, header)
        self._tensors_left -= len(entries)
        if self._tensors_left < 0:
            raise CheckpointError(f"{file}: with it the checkpoint has more than {MAX_TENSORS} tensors")
        data_bytes = size - _LENGTH_BYTES - length
        return {name: _tensor(file, stamp, name, entry, data_bytes) for name, entry in entries.items()}


def _entries(file: Path, header: bytes) -> dict[str, msgspec.Raw]:
    try:
        entries = parse_json(header, dict[str, msgspec.Raw], file)
    except CheckpointError:
        raise CheckpointError(f"{file}: corrupt: its header is not one of safetensors") from None
    entries.pop("__metadata__", None)
    return entries


def _tensor(file: Path, stamp: FileStamp, name: str, raw: msgspec.Raw, data_bytes: int) -> TensorInfo:
    if not is_name(name):
        expected = f"1 to {MAX_NAME_CHARS} printable characters without '/'"
        raise CheckpointError(f"{file}: corrupt: a tensor is named {shown(name)}, expected {expected}")
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: corrupt: its header is not one of safetensors: tensor {name}: {error}"
        ) from None
    begin, end = entry.data_offsets
    info = TensorInfo(file, entry.dtype, entry.shape, stamp)
    if end > data_bytes:
        raise CheckpointError(
            f"{file}: truncated: tensor {name} ends at byte {end} of the data, the file has {data_bytes}"
            " bytes of it"
        )
    item_bytes = _ITEM_BYTES.get(info.dtype)
    if begin > end or (item_bytes is not None and end - begin != info.num_elements * item_bytes):
        raise CheckpointError(
            f"{file}: corrupt: tensor {name} of shape {info.shape} takes {end - begin} bytes"
        )
    return info
