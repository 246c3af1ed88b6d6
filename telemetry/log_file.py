"""The log of one run of `pdserve up`, kept for `pdserve logs` in the user's runtime folder: its newest lines,
as many as fit.

The process that writes a log holds a lock on it, so that a reader knows when no more will come. The logs of
the last few runs are kept."""

import fcntl
import os
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import BinaryIO

from ..core import admin_socket
from ..core.errors import PdserveError

MAX_BYTES = 8 << 20  # of a file; the one before it is kept as well
NUM_KEPT = 3  # logs of runs that have ended


class LogFile:
    """The writing end. Every method is called on one thread at a time."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Raises PdserveError when the runtime folder is not private, or nothing can be written there."""
        admin_socket.prepare()
        remove_ended(num_kept=NUM_KEPT - 1)  # the new one is kept as well
        self._max_bytes = max_bytes
        self._path = admin_socket.runtime_folder() / f"up-{os.getpid()}.log"
        try:
            self._file = _opened(self._path)
        except OSError as error:
            raise PdserveError(f"{self._path}: cannot be written: {error.strerror}") from error

    def write(self, line: str) -> None:
        """A full disk costs the line and nothing else. So does a log that is closed already, as the thread
        that writes may have been waiting for a terminal."""
        with suppress(OSError, ValueError):
            if self._file.tell() >= self._max_bytes:
                self._begin_again()
            self._file.write(line.encode(errors="backslashreplace") + b"\n")

    def _begin_again(self) -> None:
        """Replaces the file by an empty one, so that a file of its name is there at any time."""
        new = self._path.with_suffix(".new")
        file = _opened(new)
        before(self._path).unlink(missing_ok=True)
        os.link(self._path, before(self._path))
        new.replace(self._path)
        self._file.close()
        self._file = file

    def publish(self, address: str) -> None:
        """Makes it the log of the cluster whose gRPC server listens on `address`."""
        link = _link(address)
        new = link.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            new.unlink(missing_ok=True)
            new.symlink_to(self._path)
            new.replace(link)

    def remove(self) -> None:
        """Leaves nothing of a start that was interrupted."""
        _remove(self._path)

    def close(self) -> None:
        self._file.close()


def find(address: str) -> Path | None:
    """Returns the log of the cluster that listens, or has listened last, on `address`. Raises
    UnsafeFolder."""
    admin_socket.prepare()
    with suppress(OSError):
        path = _link(address).readlink()
        if path.exists():
            return path
    return None


def latest() -> Path | None:
    """Returns the log of the run that writes one, or else has done so last. Raises UnsafeFolder."""
    admin_socket.prepare()
    logs = _logs()
    return min(logs, key=lambda path: (not is_written(path), _age(path))) if logs else None


def is_written(path: Path) -> bool:
    """Returns whether a process still writes to the log."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _opened(path: Path) -> BinaryIO:
    path.touch(0o600)
    file = path.open("wb", buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def remove_ended(num_kept: int = 0) -> None:
    """Removes the logs of runs that have ended, all but the newest `num_kept`."""
    ended = [path for path in _logs() if not is_written(path)]
    for path in sorted(ended, key=_age)[num_kept:]:
        _remove(path)


def _remove(path: Path) -> None:
    before(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    for link in admin_socket.runtime_folder().glob("*.log"):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def _logs() -> list[Path]:
    return list(admin_socket.runtime_folder().glob("up-*.log"))


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return inf


def before(path: Path) -> Path:
    """Returns the path of the lines before those in `path`; there may be none."""
    return path.with_suffix(".log.1")


def _link(address: str) -> Path:
    return admin_socket.socket_link(address).with_suffix(".log")
