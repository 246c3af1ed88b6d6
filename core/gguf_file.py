"""The header of a GGUF file: its metadata and its table of tensors, within bounds. Nothing in it is trusted.

The format is ggml's (docs/gguf.md there), versions 2 and 3, little-endian. Values of tensors are read by
`engine.gguf_tensors`. All errors are CheckpointErrors."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .checkpoint_files import FileStamp, is_name, open_regular, shown, stamp_of
from .errors import CheckpointError

SUFFIX = ".gguf"
MAX_HEADER_BYTES = 64 << 20  # vocabularies of 250,000 tokens come to 12 MiB; parsed, up to ten times that
MAX_PAIRS = 4096
MAX_STRING_BYTES = 1 << 20  # chat templates have tens of thousands
MAX_ITEMS = 1 << 21  # of all lists: tokens, scores, types, merges; the largest come to a million
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _LIST = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header announces it."""

    shape: tuple[int, ...]  # outermost dimension first
    kind: int  # ggml's number of its type
    offset: int  # from the beginning of the file


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data of a file's tensors."""

    file: Path
    stamp: FileStamp  # of the file when the header was read
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    num_bytes: int  # before the first tensor's data


def is_gguf(path: Path) -> bool:
    """Whether a model's path names a GGUF file, by its name."""
    return path.suffix.lower() == SUFFIX


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises CheckpointError where the file is missing, truncated, corrupt or beyond a bound."""
    with open_regular(file) as stream:
        try:
            return _Reader(file, stream).header()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


class _Reader:
    """Reads one header, from its beginning to its end."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self._bytes_left = MAX_HEADER_BYTES
        self._items_left = MAX_ITEMS

    def header(self) -> GgufHeader:
        stamp = stamp_of(self._stream)
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{self._file}: not a GGUF file: it does not begin with {_MAGIC.decode()}")
        version, num_tensors, num_pairs = self._numbers("<IQQ")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self._file}: GGUF version {version} is not supported, expected 2 or 3, little-endian"
            )
        self._check("number of tensors", num_tensors, MAX_TENSORS)
        self._check("number of metadata keys", num_pairs, MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._name("key")
            if key in metadata:
                raise self._corrupt(f"key {key} occurs twice")
            metadata[key] = self._value(key, self._number("<I"))
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = self._name("tensor")
            if name in tensors:
                raise self._corrupt(f"tensor {name} occurs twice")
            tensors[name] = self._tensor(name)
        return self._with_offsets(stamp, metadata, tensors)

    def _with_offsets(
        self, stamp: FileStamp, metadata: dict[str, Any], tensors: dict[str, GgufTensor]
    ) -> GgufHeader:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
            raise self._corrupt(f"general.alignment: got {shown(alignment)}, expected 1 to {MAX_ALIGNMENT}")
        data_start = -(-self._stream.tell() // alignment) * alignment
        placed = {
            name: GgufTensor(tensor.shape, tensor.kind, data_start + tensor.offset)
            for name, tensor in tensors.items()
        }
        return GgufHeader(self._file, stamp, metadata, placed, self._stream.tell())

    def _tensor(self, name: str) -> GgufTensor:
        num_dimensions = self._number("<I")
        self._check(f"number of dimensions of tensor {name}", num_dimensions, MAX_DIMENSIONS)
        dimensions = self._numbers(f"<{num_dimensions}Q")
        for size in dimensions:
            self._check(f"size of tensor {name}", size, 2**31 - 1)
        kind, offset = self._numbers("<IQ")
        return GgufTensor(tuple(reversed(dimensions)), kind, offset)

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(key)
        if kind != _LIST:
            raise self._corrupt(f"{key}: unknown type {kind}")
        item_kind, length = self._numbers("<IQ")
        self._check(f"length of {key}", length, self._items_left)
        self._items_left -= length
        if item_kind == _STRING:
            return [self._string(key) for _ in range(length)]
        if item_kind not in _SCALARS:
            raise self._corrupt(f"{key}: a list of type {item_kind}")
        return list(self._numbers(f"<{length}{_SCALARS[item_kind][1]}"))

    def _name(self, of: str) -> str:
        name = self._string(of)
        if not is_name(name):
            raise self._corrupt(f"a {of} is named {shown(name)}")
        return name

    def _string(self, of: str) -> str:
        length = self._number("<Q")
        self._check(f"length of {of}", length, MAX_STRING_BYTES)
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._corrupt(f"{of}: not UTF-8") from None

    def _number(self, form: str) -> Any:
        return self._numbers(form)[0]

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, num_bytes: int) -> bytes:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise CheckpointError(f"{self._file}: its header has more than {MAX_HEADER_BYTES} bytes")
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            raise CheckpointError(f"{self._file}: truncated: it ends within its header")
        return data

    def _check(self, what: str, value: int, maximum: int) -> None:
        if value > maximum:
            raise self._corrupt(f"{what}: got {value}, expected at most {maximum}")

    def _corrupt(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: corrupt: {why}")
