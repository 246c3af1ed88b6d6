"""Chooses a pair's link from where the two workers keep their KV and from the setting `kv.transport`."""

from typing import NamedTuple

from ..core.devices import GPU_LINKS
from .link import LinkError

LINKS = ("shm", "gloo", *GPU_LINKS)
GROUP_LINKS = ("gloo", "nccl")  # both sides build a process group
TRANSPORTS = ("auto", *LINKS)


class Place(NamedTuple):
    """The memory in which one worker keeps its KV."""

    host_id: str
    gpu: str  # a UUID; empty on a CPU


def choose_link(mine: Place, theirs: Place, transport: str) -> str:
    """Returns one of LINKS. A GPU and a CPU meet in host memory. Raises LinkError."""
    possible = [link for link in LINKS if _is_possible(link, mine, theirs)]
    if transport == "auto":
        return next(link for link in (*GPU_LINKS, "shm", "gloo") if link in possible)
    if transport not in possible:
        raise LinkError(
            f"kv.transport: got {transport!r}, expected auto or {' or '.join(possible)}: {_WANTED[transport]}"
        )
    return transport


_WANTED = {
    "shm": "the two workers cannot share memory",
    "cuda_ipc": "the two workers are not on one GPU",
    "nccl": "the two workers are not on two GPUs",
}


def _is_possible(link: str, mine: Place, theirs: Place) -> bool:
    if link == "shm":
        return mine.host_id == theirs.host_id
    if link == "cuda_ipc":
        return mine.gpu != "" and mine.gpu == theirs.gpu
    if link == "nccl":
        return mine.gpu != "" != theirs.gpu and mine.gpu != theirs.gpu
    return True
