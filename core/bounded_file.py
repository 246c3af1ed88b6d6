"""Reads files that somebody names on a command line or in a configuration, whatever they turn out to be."""

import errno
import os
import stat
from pathlib import Path


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a file, or what is written to a pipe until its writers close it; without writers
    that is nothing.

    Raises OSError, with its reason in `strerror`, also for a device or a folder, and for more than
    `max_bytes`."""
    # without O_NONBLOCK, opening a pipe waits for a writer
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "neither a regular file nor a pipe", str(path))
        os.set_blocking(number, True)
        with os.fdopen(number, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(number)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(path))
    return data
