"""Link between two processes of one host: P gathers straight into D's staging ring, an anonymous sealed
memfd."""

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any, ClassVar

from .link import LinkError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MAP_FLAGS = mmap.MAP_SHARED | mmap.MAP_POPULATE


def host_id() -> str:
    """Returns an identity, equal for processes that reach each other's Unix sockets by path: same boot, same
    mount namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/mnt').st_ino}"


class ShmLink:
    """Both sides' view of the ring. D creates it and passes the descriptor to P; each epoch has a ring of its
    own."""

    name: ClassVar = "shm"
    executor = None
    takes_turns = False

    def __init__(self, fd: int, num_slots: int, slot_bytes: int) -> None:
        self.is_gone = False
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(fd, num_slots * slot_bytes, flags=_MAP_FLAGS)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int) -> "tuple[ShmLink, int]":
        """D: creates a ring, and returns its descriptor for the caller to send and to close. Raises
        OSError."""
        fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            return cls(fd, num_slots, slot_bytes), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, num_slots: int, slot_bytes: int) -> "ShmLink":
        """P: maps D's ring. Raises LinkError when it is not of the announced size, or could still shrink
        while mapped."""
        size = os.fstat(fd).st_size
        if num_slots < 1 or slot_bytes < 1 or size != num_slots * slot_bytes:
            raise LinkError(f"the peer's ring has {size} bytes, announced were {num_slots} x {slot_bytes}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise LinkError("the peer's ring is not sealed")
        return cls(fd, num_slots, slot_bytes)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def send(self, slot: int, num_bytes: int, seq: int) -> None:
        """Does nothing: the bytes have been in the ring since they were gathered."""

    def recv(self, slot: int, num_bytes: int, seq: int) -> None:
        """Does nothing: the bytes were in the ring before they were announced."""

    def wait(self, ticket: Any, timeout_s: float) -> None:
        raise AssertionError("a shared-memory link has no tickets")

    def kill(self) -> None:
        self.is_gone = True
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass  # a view is still held, for example by an exception's frames: the memory is freed with it

    def join(self) -> None:
        """Returns at once: nothing outlives `kill`."""
