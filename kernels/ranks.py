"""The memory in which the ranks of one instance meet: sums and gathers of tensors on the CPU, and words that
count up and can be waited for.

Rank 0 creates it, an anonymous file of which nothing is left when the last rank has ended; the others open it
by its address. Sums are taken in the order of ranks, element by element: every rank gets the same bits, in
every run, whatever the batch."""

import ctypes
import fcntl
import mmap
import os
import struct
from enum import IntEnum
from functools import cache

import torch

from .levels import LIBRARY_PATH, UnavailableError

MAX_RANKS = 8
SLOT_BYTES = 512 << 10  # a rank has two: a larger tensor travels in chunks
SPIN_S = 50e-6  # before a rank that waits sleeps
_WORD_BYTES = 64
_HEADER = struct.Struct("<16sIII")  # nonce, num_ranks, slot_bytes, ring_bytes
_HEADER_OFFSET = 3072
_JOINED_OFFSET = 3584
_CONTROL_BYTES = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_DONE, _ABORTED, _DEAD, _LATE = range(4)
_RANK_SHIFT = 4


class Word(IntEnum):
    """Numbers of the words; those of a rank follow one another."""

    ABORT = 0
    BELL = 1  # counts the messages of ranks to rank 0
    GENERATION = 2  # of each rank: how often it has met the others
    COMMANDS_WRITTEN = GENERATION + MAX_RANKS  # bytes of rank 0's ring
    COMMANDS_READ = COMMANDS_WRITTEN + 1  # by each rank
    REPLIES_WRITTEN = COMMANDS_READ + MAX_RANKS  # bytes of each rank's ring
    REPLIES_READ = REPLIES_WRITTEN + MAX_RANKS
    END = REPLIES_READ + MAX_RANKS


class RankLost(Exception):
    """Another rank has died, or did not come in time, or has given up: the instance cannot go on."""

    def __init__(self, reason: str, rank: int | None = None) -> None:
        super().__init__(reason)
        self.rank = rank  # None: unknown


class RankMemory:
    """One rank's view of it. Collective calls are made by one thread, by all ranks in the same order; words
    may be used by any."""

    def __init__(self, fd: int, rank: int, num_ranks: int, slot_bytes: int, ring_bytes: int) -> None:
        """Takes over the descriptor. Raises RankLost where another process is this rank already."""
        self.rank, self.num_ranks, self.ring_bytes = rank, num_ranks, ring_bytes
        self.address = ""  # at rank 0: where the other ranks, processes of the same user and host, find it
        self._fd = fd
        self._map = mmap.mmap(fd, _num_bytes(num_ranks, slot_bytes, ring_bytes))
        self._view = memoryview(self._map)
        self._c = _library()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        joined, slots = start + _JOINED_OFFSET, start + _CONTROL_BYTES
        self._handle = self._c.pd_ranks_join(start, Word.END, joined, slots, slot_bytes, fd, rank, num_ranks)
        if not self._handle:
            raise RankLost(f"rank {rank} is there already", rank)
        self._rings = _CONTROL_BYTES + 2 * num_ranks * slot_bytes
        self.set_spin(SPIN_S)

    @classmethod
    def create(
        cls, num_ranks: int, *, slot_bytes: int = SLOT_BYTES, ring_bytes: int = 1 << 20
    ) -> "RankMemory":
        """Returns rank 0's view of new memory. `slot_bytes` is a multiple of 64, `ring_bytes` a power of two.

        Raises UnavailableError without the native library, OSError without memory."""
        _library()
        fd = os.memfd_create("pdserve-ranks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _num_bytes(num_ranks, slot_bytes, ring_bytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        nonce = os.urandom(16)
        os.pwrite(fd, _HEADER.pack(nonce, num_ranks, slot_bytes, ring_bytes), _HEADER_OFFSET)
        memory = cls(fd, 0, num_ranks, slot_bytes, ring_bytes)
        memory.address = f"/proc/{os.getpid()}/fd/{fd} {nonce.hex()}"
        return memory

    @classmethod
    def join(cls, address: str, rank: int) -> "RankMemory":
        """Raises RankLost where rank 0 is gone, UnavailableError without the native library."""
        _library()
        path, nonce = address.split(" ")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RankLost(f"rank 0 is gone: {path}: {error.strerror}", 0) from error
        header = os.pread(fd, _HEADER.size, _HEADER_OFFSET)
        if header[:16] != bytes.fromhex(nonce):
            os.close(fd)
            raise RankLost(f"rank 0 is gone: {path} is another file now", 0)
        _, num_ranks, slot_bytes, ring_bytes = _HEADER.unpack(header)
        return cls(fd, rank, num_ranks, slot_bytes, ring_bytes)

    def set_spin(self, seconds: float) -> None:
        """Sets how long a rank spins before it sleeps."""
        self._c.pd_ranks_set_spin(self._handle, int(seconds * 1e9))

    def all_reduce(self, x: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Replaces a contiguous x, of equal shape on all ranks, by its sum over ranks, taken in float32;
        returns it. Raises RankLost."""
        summed = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        bf16 = int(x.dtype == torch.bfloat16)
        self._check(
            self._c.pd_ranks_all_reduce(
                self._handle, bf16, summed.data_ptr(), summed.numel(), _microseconds(timeout_s)
            )
        )
        return x if summed is x else x.copy_(summed)

    def gather(self, x: torch.Tensor, widths: list[int], timeout_s: float) -> torch.Tensor:
        """Returns, on rank 0, the ranks' x [R, widths[rank]] side by side, [R, sum(widths)]; on others x.
        Raises RankLost."""
        out = x.new_empty((len(x), sum(widths))) if self.rank == 0 else None
        num_bytes = [width * x.element_size() for width in widths]
        self._gather(x.data_ptr(), len(x), num_bytes, None if out is None else out.data_ptr(), 0, timeout_s)
        return x if out is None else out

    def exchange(self, data: bytes, timeout_s: float) -> list[bytes]:
        """Returns every rank's data, of equal length on all ranks. Raises RankLost."""
        out = ctypes.create_string_buffer(len(data) * self.num_ranks)
        widths = [len(data)] * self.num_ranks
        self._gather(data, 1, widths, ctypes.addressof(out), 1, timeout_s)
        return [out.raw[at : at + len(data)] for at in range(0, len(out.raw), len(data))]

    def meet(self, timeout_s: float) -> None:
        """Returns when all ranks have come here. Raises RankLost."""
        self._check(self._c.pd_ranks_meet(self._handle, _microseconds(timeout_s)))

    def commands_ring(self) -> memoryview:
        """Returns the ring that rank 0 writes and all others read."""
        return self._view[self._rings : self._rings + self.ring_bytes]

    def replies_ring(self, rank: int) -> memoryview:
        """Returns the ring that `rank` writes and rank 0 reads."""
        start = self._rings + rank * self.ring_bytes
        return self._view[start : start + self.ring_bytes]

    def value(self, word: int) -> int:
        return int(self._c.pd_ranks_value(self._handle, word))

    def add(self, word: int, amount: int) -> None:
        """Counts a word up, modulo 2^32, and wakes those who wait for it."""
        self._c.pd_ranks_add(self._handle, word, amount)

    def wait(self, word: int, value: int, owner: int | None, timeout_s: float | None = None) -> None:
        """Returns when the word, which rank `owner` counts, has reached the value. Raises RankLost, also at
        the end of the time."""
        self._check(self._wait(word, value, owner, timeout_s, 1))

    def has_reached(self, word: int, value: int, timeout_s: float | None) -> bool:
        """Returns whether the word reaches the value within a time. Raises RankLost."""
        result = self._wait(word, value, None, timeout_s, 0)
        if result != _LATE:
            self._check(result)
        return result == _DONE

    def abort(self) -> None:
        """Ends the meeting: every rank that waits for what has not come yet, now or later, gets RankLost."""
        self._c.pd_ranks_abort(self._handle)

    @property
    def is_aborted(self) -> bool:
        return self.value(Word.ABORT) != 0

    def close(self) -> None:
        """Leaves; to the other ranks this one is dead. No thread may be in a call."""
        if self._handle:
            self._c.pd_ranks_leave(self._handle)
            self._handle = None
            os.close(self._fd)

    def _wait(self, word: int, value: int, owner: int | None, timeout_s: float | None, fatal: int) -> int:
        return int(
            self._c.pd_ranks_wait(
                self._handle,
                word,
                value & 0xFFFFFFFF,
                -1 if owner is None else owner,
                -1 if timeout_s is None else _microseconds(timeout_s),
                fatal,
            )
        )

    def _gather(
        self, x: object, num_rows: int, widths: list[int], out: int | None, to_all: int, timeout_s: float
    ) -> None:
        sizes = (ctypes.c_int64 * self.num_ranks)(*widths)
        self._check(
            self._c.pd_ranks_gather(self._handle, x, num_rows, sizes, out, to_all, _microseconds(timeout_s))
        )

    def _check(self, result: int) -> None:
        if result == _DONE:
            return
        rank = result >> _RANK_SHIFT
        reason = result & ((1 << _RANK_SHIFT) - 1)
        if reason == _ABORTED:
            raise RankLost("another rank has given up, or was ended")
        raise RankLost(f"rank {rank} {'has died' if reason == _DEAD else 'did not come in time'}", rank)


def _num_bytes(num_ranks: int, slot_bytes: int, ring_bytes: int) -> int:
    """Rank 0's own ring of replies is that of commands."""
    return _CONTROL_BYTES + num_ranks * (2 * slot_bytes + ring_bytes)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


@cache
def _library() -> ctypes.CDLL:
    if not LIBRARY_PATH.exists():
        raise UnavailableError(f"{LIBRARY_PATH.name} was not built with this package")
    library = ctypes.CDLL(str(LIBRARY_PATH))
    p, n, i, u = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
    for name, arguments, result in (
        ("join", [p, i, p, p, n, i, i, i], p),
        ("leave", [p], None),
        ("set_spin", [p, n], None),
        ("abort", [p], None),
        ("add", [p, i, u], None),
        ("value", [p, i], u),
        ("wait", [p, i, u, i, n, i], i),
        ("meet", [p, n], i),
        ("all_reduce", [p, i, p, n, n], i),
        ("gather", [p, p, n, ctypes.POINTER(n), p, i, n], i),
    ):
        function = getattr(library, f"pd_ranks_{name}")
        function.argtypes, function.restype = arguments, result
    return library
