"""Makes this side's end of the links that need a GPU's memory or a process group."""

from collections.abc import Callable
from typing import Any

from .config import TransferConfig
from .cuda_ipc import CudaIpcLink, RingShelf
from .interfaces import Gpu
from .lanes import Lanes
from .meeting import MeetingLink
from .protocol import Prepare


class LinkMaker:
    """Knows this side's address and GPU. `on_stuck` is called with the reason why this process cannot go
    on."""

    def __init__(
        self, host: str, config: TransferConfig, gpu: Gpu | None, on_stuck: Callable[[str], None]
    ) -> None:
        self._host = host
        self._config = config
        self._gpu = gpu
        self._on_stuck = on_stuck
        self._rings = None if gpu is None else RingShelf(gpu)
        self._lanes = Lanes("pdserve-link")
        self._gloo_device: Any = None  # opened with the first link over gloo

    def close(self) -> None:
        """Ends what the links shared; to be called when all have gone."""
        self._lanes.close()
        self._gloo_device = None

    def own_ring(self, num_slots: int, slot_bytes: int) -> tuple[CudaIpcLink, bytes]:
        """Returns D's end of a link within a GPU, and the handle that P needs. Raises LinkError."""
        assert self._rings is not None, "a greeting from another GPU is refused"
        ring, handle = self._rings.take(num_slots * slot_bytes)
        return CudaIpcLink(ring, num_slots, slot_bytes, self._rings), handle

    def ring_of_peer(self, prepare: Prepare) -> CudaIpcLink:
        """Returns P's end of a link within a GPU. Raises LinkError."""
        assert self._gpu is not None, "the link was chosen by it"
        ring = self._gpu.open(prepare.handle, prepare.num_slots * prepare.slot_bytes)
        return CudaIpcLink(ring, prepare.num_slots, prepare.slot_bytes)

    def group(self, kind: str, rank: int, num_slots: int, slot_bytes: int) -> MeetingLink:
        """Returns one rank of a link over a process group, not built yet."""
        timeout_s, lane = self._config.build_timeout_s(kind), self._lanes.lane()
        if kind == "gloo":
            from .gloo import GlooLink, open_device  # imports torch, as the next one does

            if self._gloo_device is None:
                self._gloo_device = open_device(self._host)
            return GlooLink(rank, self._host, num_slots, slot_bytes, timeout_s, lane, self._gloo_device)
        from .nccl import NcclLink

        assert self._gpu is not None, "a greeting without a GPU is refused"
        return NcclLink(
            rank, self._host, num_slots, slot_bytes, timeout_s, lane, self._gpu.device, self._on_stuck
        )
