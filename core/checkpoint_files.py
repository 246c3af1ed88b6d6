"""Reads the small files of a checkpoint directory. A checkpoint comes from anywhere, so nothing in it is
taken on trust.

Only regular files are read (a symbolic link is followed, as model hubs cache files behind links), each up to
a size that is checked before a byte is read. JSON is strict: no NaN, no Infinity, nothing nested without end.
All errors are CheckpointErrors of bounded, printable text."""

import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from .errors import CheckpointError

MAX_CONFIG_BYTES = 4 << 20  # values of JSON take up to 30 times their text: 120 MiB
MAX_TOKENIZER_CONFIG_BYTES = 8 << 20  # some list thousands of added tokens
MAX_TOKENIZER_BYTES = 64 << 20  # the largest that are known have 35 MiB
MAX_NAME_CHARS = 255  # the limit for a tensor's name, and the operating system's for a file
MAX_SHOWN_CHARS = 80

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = MAX_SHOWN_CHARS


def shown(value: object) -> str:
    """The beginning of a value from a checkpoint's file as Python writes it, printable, for messages."""
    text = _short.repr(value)
    return text if len(text) <= 2 * MAX_SHOWN_CHARS else f"{text[: 2 * MAX_SHOWN_CHARS]}..."


def shown_text(text: str) -> str:
    """The same of a text, without quotes."""
    return shown(text)[1:-1]


def open_regular(file: Path) -> BinaryIO:
    """Opens `file` to read. Raises CheckpointError where it is missing, unreadable, or a pipe, a device or a
    directory."""
    try:
        # a pipe that nobody writes to would block
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise CheckpointError(
            f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise CheckpointError(f"{file}: not a regular file")
    return os.fdopen(number, "rb")


@dataclass(frozen=True)
class FileStamp:
    """Detects whether a name still refers to the same file, and whether it has been modified since."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


def stamp_of(stream: BinaryIO) -> FileStamp:
    status = os.fstat(stream.fileno())
    return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def size_of(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size


def check_size(file: Path, num_bytes: int, max_bytes: int) -> None:
    """Raises CheckpointError."""
    if num_bytes > max_bytes:
        raise CheckpointError(f"{file}: {num_bytes} bytes, expected at most {max_bytes}")


def read_bytes(file: Path, max_bytes: int) -> bytes:
    """The content of `file`. Raises CheckpointError."""
    with open_regular(file) as stream:
        check_size(file, size_of(stream), max_bytes)
        try:
            data = stream.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    check_size(file, len(data), max_bytes)  # it may grow meanwhile
    return data


def parse_json(data: bytes, kind: type[T], file: Path) -> T:
    """`data`, which is JSON that `file` holds, as a value of `kind`. Raises CheckpointError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError."""
    data = read_bytes(file, MAX_CONFIG_BYTES)
    values = parse_json(data, object, file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return values


def is_name(name: str) -> bool:
    """Whether a text may name a tensor, or a file of the checkpoint's directory, and stand in a message."""
    return (
        0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and "/" not in name and name not in (".", "..")
    )
