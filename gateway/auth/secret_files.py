"""Files that hold or protect secrets, such as clients' keys and the TLS private key: change detection, and
checks of owner and permissions."""

import os
from pathlib import Path

Stamp = tuple[int, int, int, int]
OTHERS_READ_OR_WRITE, GROUP_WRITES = 0o006, 0o020


def file_stamp(path: Path) -> Stamp | None:
    """Returns a value that differs after each change, including owner and mode; None if there is no such
    file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def expected_rights(status: os.stat_result, euid: int) -> str | None:
    """Returns the permissions that the file requires instead of those in `status`, and how to set them; None
    if they are right.

    Its group may read it, as certificate packages and secrets mounted into containers arrange it."""
    if status.st_uid not in (euid, 0):
        owner = "root" if euid == 0 else f"the server's user (uid {euid}) or root"
        return f"a file that belongs to {owner}, not to uid {status.st_uid} (chown)"
    if status.st_mode & (OTHERS_READ_OR_WRITE | GROUP_WRITES):
        mode = f"{status.st_mode & 0o777:o}"
        return (
            f"a file that others cannot read and its owner alone can write, not one of mode {mode} (chmod"
            " 600, or 640)"
        )
    return None
