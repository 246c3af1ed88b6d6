"""Chooses chunk sizes, from the link that carries the chunks and the transfer that they are parts of.
Pure."""

from typing import NamedTuple

WANTED_CHUNKS = 8  # per transfer, at least


class ChunkBytes(NamedTuple):
    """The bounds of a link's chunk sizes, in bytes."""

    smallest: int  # a smaller one costs more than it hides
    largest: int  # the size of the ring's slots on the receiving side


# Shared memory's ring should stay in the CPUs' last-level cache; gloo pays more for every message. Between
# GPUs a chunk costs either side's CPU the same whatever its size (`bench/microbench/chunk_cost.py`), and the
# bytes next to nothing.
CHUNK_BYTES = {
    "shm": ChunkBytes(256 << 10, 2 << 20),
    "gloo": ChunkBytes(256 << 10, 4 << 20),
    "cuda_ipc": ChunkBytes(4 << 20, 16 << 20),
    "nccl": ChunkBytes(4 << 20, 16 << 20),
}


def chunk_bytes(link: str, slot_bytes: int, num_cells: int, bytes_per_cell: int) -> int:
    """Returns the maximum chunk size for a transfer of `num_cells` (layer, token) cells. The last chunk
    cannot hide behind the prefill: it should not be the greater part of a small transfer."""
    wanted_bytes = num_cells * bytes_per_cell // WANTED_CHUNKS
    return min(slot_bytes, max(wanted_bytes, CHUNK_BYTES[link].smallest, bytes_per_cell))
