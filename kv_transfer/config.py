"""A worker's membership and its transfers' limits, fixed when an endpoint is made."""

from dataclasses import dataclass
from pathlib import Path

from .chunk_size import CHUNK_BYTES
from .parts import Share

MAX_PAYLOAD_BYTES = 4 << 20
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + (64 << 10)


@dataclass(frozen=True)
class Membership:
    """A worker's part in its cluster."""

    worker_id: str
    incarnation: int
    token: str  # the cluster's secret
    host: str  # the IP address to bind and to advertise
    socket_root: Path = Path("/tmp")  # the private folder for the Unix socket is created here
    share: Share | None = None  # of the instance's KV; None: all of it


@dataclass(frozen=True)
class TransferConfig:
    """Sizes of the staging ring and every deadline of the protocol."""

    # size of one of our ring slots, and the maximum of a chunk; None: the link's default
    chunk_bytes: int | None = None
    ring_slots: int = 4  # chunks under way per pair, shared by its transfers
    connect_timeout_s: float = 5.0
    # to join two GPUs: the first time, NCCL searches for seconds for the paths between them
    nccl_timeout_s: float = 60.0
    heartbeat_s: float = 0.5
    dead_after_s: float = 3.0  # without a sign of life
    chunk_timeout_s: float = 5.0  # from chunk to ACK, from COMMIT to COMMITTED
    # a reservation without an offer, or an offer without a reservation; any message of the peer renews it
    lease_s: float = 30.0
    max_lease_s: float = 600.0  # however often it is renewed
    max_idle_s: float = 300.0  # a link without transfers is closed after this
    max_links: int = 64  # in each direction: beyond it, those that were not used for longest are closed

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"TransferConfig.{name}: {value!r} is not valid, expected a positive number")
        if self.dead_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"TransferConfig.dead_after_s: {self.dead_after_s!r} is not valid, expected at least two"
                f" heartbeats of {self.heartbeat_s} s"
            )

    def build_timeout_s(self, link: str) -> float:
        """Returns how long both sides of a link over a group may take to meet."""
        return self.nccl_timeout_s if link == "nccl" else self.connect_timeout_s

    def chunk_bytes_of(self, link: str) -> int:
        """Returns the size of one slot of our ring for a link of this kind."""
        return CHUNK_BYTES[link].largest if self.chunk_bytes is None else self.chunk_bytes
