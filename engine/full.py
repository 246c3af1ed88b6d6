"""Finds which parts of this host are full: its memory, and folders that Ray and workers write to."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress

from .gpu import probe_memory

MIN_FREE_BYTES = 4 << 20  # of a file system that is not full
MIN_FREE_MEMORY = 0.06  # of all memory; Ray ends processes where less than 0.05 of it is left
MEMORY = "its memory"


def full_parts(ray_folder: str) -> tuple[tuple[str, int], ...]:
    """Returns the full parts and their sizes in bytes; a folder stands for its file system."""
    full = list(_full_folders(["/dev/shm", tempfile.gettempdir(), os.path.expanduser("~"), ray_folder]))
    total, available = probe_memory()
    if available < MIN_FREE_MEMORY * total:
        full.append((MEMORY, total))
    return tuple(full)


def _full_folders(folders: Iterable[str]) -> Iterable[tuple[str, int]]:
    seen: set[int] = set()
    for folder in folders:
        with suppress(OSError):
            device = os.stat(folder).st_dev
            if device not in seen:
                seen.add(device)
                found = os.statvfs(folder)
                if found.f_bavail * found.f_frsize < MIN_FREE_BYTES:
                    yield folder, found.f_blocks * found.f_frsize
