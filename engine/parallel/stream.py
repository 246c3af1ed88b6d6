"""Messages between rank 0 and the others, in rings of the memory in which ranks meet.

Rank 0 writes one ring that all others read, each at its own pace: every rank gets the same messages in the
same order. Each of the others has a ring of its own to rank 0. A message is a kind and bytes, of any length:
one that is longer than the ring is read while it is written."""

import struct
import threading
from typing import NamedTuple

from ...kernels.ranks import RankMemory, Word

_HEADER = struct.Struct("<II")  # kind, length
_MODULUS = 1 << 32


class Message(NamedTuple):
    kind: int
    payload: bytearray


class _RingWriter:
    """Usable by any thread. `read` has a word and its rank for each reader."""

    def __init__(
        self, memory: RankMemory, ring: memoryview, written: int, read: list[tuple[int, int]]
    ) -> None:
        self._memory = memory
        self._ring = ring
        self._written_word = written
        self._read = read
        self._written = 0
        self._lock = threading.Lock()

    def write(self, kind: int, payload: bytes | bytearray | memoryview, timeout_s: float) -> None:
        """Raises RankLost where a reader leaves no room in time."""
        data = memoryview(_HEADER.pack(kind, len(payload)) + payload)
        size = len(self._ring)
        with self._lock:
            while data:
                room = size - max(
                    (self._written - self._memory.value(word)) % _MODULUS for word, _ in self._read
                )
                if not room:
                    for word, rank in self._read:
                        self._memory.wait(word, self._written - size + 1, rank, timeout_s)
                    continue
                at = self._written % size
                count = min(room, len(data), size - at)
                self._ring[at : at + count] = data[:count]
                self._written = (self._written + count) % _MODULUS
                self._memory.add(self._written_word, count)
                data = data[count:]


class _RingReader:
    """Used by one thread."""

    def __init__(self, memory: RankMemory, ring: memoryview, written: int, read: int, writer: int) -> None:
        self._memory = memory
        self._ring = ring
        self._written_word = written
        self._read_word = read
        self._writer = writer
        self._num_read = 0

    @property
    def is_empty(self) -> bool:
        return self._memory.value(self._written_word) == self._num_read

    def read(self) -> Message:
        """Waits for the next message. Raises RankLost."""
        kind, length = _HEADER.unpack(self._take(_HEADER.size))
        return Message(kind, self._take(length))

    def _take(self, length: int) -> bytearray:
        out, done = bytearray(length), 0
        while done < length:
            self._memory.wait(self._written_word, self._num_read + 1, self._writer)
            at = self._num_read % len(self._ring)
            there = (self._memory.value(self._written_word) - self._num_read) % _MODULUS
            count = min(there, length - done, len(self._ring) - at)
            out[done : done + count] = self._ring[at : at + count]
            done += count
            self._num_read = (self._num_read + count) % _MODULUS
            self._memory.add(self._read_word, count)
        return out


class Leader:
    """Rank 0's end of the streams."""

    def __init__(self, memory: RankMemory) -> None:
        self._memory = memory
        others = range(1, memory.num_ranks)
        read = [(Word.COMMANDS_READ + rank, rank) for rank in others]
        self._commands = _RingWriter(memory, memory.commands_ring(), Word.COMMANDS_WRITTEN, read)
        self._replies = {
            rank: _RingReader(
                memory,
                memory.replies_ring(rank),
                Word.REPLIES_WRITTEN + rank,
                Word.REPLIES_READ + rank,
                rank,
            )
            for rank in others
        }

    def send(self, kind: int, payload: bytes | bytearray | memoryview, timeout_s: float) -> None:
        """Sends a message to every other rank, behind all earlier ones. Any thread. Raises RankLost."""
        self._commands.write(kind, payload, timeout_s)

    def replies(self, timeout_s: float | None = None) -> list[tuple[int, Message]]:
        """Returns all messages that have come, each with its rank; waits for the first one for a time, or
        endlessly. One thread. Raises RankLost."""
        rung = self._memory.value(Word.BELL)
        found = self._found()
        if not found and self._memory.has_reached(Word.BELL, rung + 1, timeout_s):
            found = self._found()
        return found

    def _found(self) -> list[tuple[int, Message]]:
        found = []
        for rank, ring in self._replies.items():
            while not ring.is_empty:
                found.append((rank, ring.read()))
        return found


class Led:
    """The end of another rank."""

    def __init__(self, memory: RankMemory) -> None:
        self._memory = memory
        rank = memory.rank
        self._commands = _RingReader(
            memory, memory.commands_ring(), Word.COMMANDS_WRITTEN, Word.COMMANDS_READ + rank, 0
        )
        read = [(Word.REPLIES_READ + rank, 0)]
        self._replies = _RingWriter(memory, memory.replies_ring(rank), Word.REPLIES_WRITTEN + rank, read)

    def receive(self) -> Message:
        """Waits for rank 0's next message. One thread. Raises RankLost."""
        return self._commands.read()

    def reply(self, kind: int, payload: bytes | bytearray | memoryview, timeout_s: float) -> None:
        """Sends a message to rank 0. Any thread. Raises RankLost."""
        self._replies.write(kind, payload, timeout_s)
        self._memory.add(Word.BELL, 1)
