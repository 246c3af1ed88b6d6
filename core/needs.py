"""The resources that an instance takes of its host: stated by its configuration, counted by the router."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """The resources that one instance takes of its host."""

    num_cores: int
    core_share: float  # share of each of them, 0 to 1
    gpu_share: float | None = None  # share of one GPU; None: it needs none
    num_bytes: int = 0  # bytes of the host's memory, where that is planned
