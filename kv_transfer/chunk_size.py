"""How large chunks are: a decision of the link that carries them and of the transfer that they are parts of.
Pure."""

from typing import NamedTuple

WANTED_CHUNKS = 8  # of a transfer, at least


class ChunkBytes(NamedTuple):
    """What a link's chunks are to have."""

    smallest: int  # one that is smaller costs more than it hides
    largest: int  # the ring's slots on the receiving side


# Shared memory's ring should stay in the processors' last cache; gloo pays more for every message. Between
# GPUs a chunk costs
# either side's processor the same whatever its size (`bench/microbench/chunk_cost.py`), and the bytes next to
# nothing.
CHUNK_BYTES = {
    "shm": ChunkBytes(256 << 10, 2 << 20),
    "gloo": ChunkBytes(256 << 10, 4 << 20),
    "cuda_ipc": ChunkBytes(4 << 20, 16 << 20),
    "nccl": ChunkBytes(4 << 20, 16 << 20),
}


def chunk_bytes(link: str, slot_bytes: int, num_cells: int, bytes_per_cell: int) -> int:
    """How large the chunks of a transfer of `num_cells` (layer, token) cells may be. The last one cannot hide
    behind the prefill: of a small transfer it should not be the greater part."""
    wanted_bytes = num_cells * bytes_per_cell // WANTED_CHUNKS
    return min(slot_bytes, max(wanted_bytes, CHUNK_BYTES[link].smallest, bytes_per_cell))
