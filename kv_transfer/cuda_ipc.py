"""Link for two processes on one GPU: P gathers straight into D's staging ring there."""

from typing import Any, ClassVar

from .interfaces import Gpu, Slot

_MAX_VIEWS = 64


class CudaIpcLink:
    """Both sides' view of the ring. P announces a chunk when its gather is done, so D may read at once."""

    name: ClassVar = "cuda_ipc"
    executor = None
    takes_turns = False

    def __init__(self, ring: Slot, num_slots: int, slot_bytes: int, rings: "RingShelf | None" = None) -> None:
        """Creates the view; D's ring is returned to `rings`."""
        self.is_gone = False
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._ring = ring
        self._rings = rings
        self._views: dict[tuple[int, int], Slot] = {}  # by slot and size: a transfer's chunks have few sizes

    def slot(self, slot: int, num_bytes: int) -> Slot:
        view = self._views.get((slot, num_bytes))
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._views[slot, num_bytes] = self._ring.narrow(0, slot * self.slot_bytes, num_bytes)
        return view

    def send(self, slot: int, num_bytes: int, seq: int) -> None:
        """Does nothing: the bytes have been in the ring since they were gathered."""

    def recv(self, slot: int, num_bytes: int, seq: int) -> None:
        """Does nothing: the bytes were in the ring before they were announced."""

    def wait(self, ticket: Any, timeout_s: float) -> None:
        raise AssertionError("a link within a GPU has no tickets")

    def kill(self) -> None:
        """Slots that the store still uses keep the memory alive."""
        if not self.is_gone:
            self.is_gone = True
            if self._rings is not None:
                self._rings.put_back(self._ring)
            self._ring = None
            self._views.clear()

    def join(self) -> None:
        """Returns at once: nothing outlives `kill`."""


class RingShelf:
    """D's rings: reused and never freed, since a peer may have one open.

    A peer that was taken for dead may still write into a ring that another pair uses by now. Chunks are
    checked in the same pass that writes them to their blocks, so this costs the other pair a NACK, and never
    delivers a wrong byte."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._unused: list[Slot] = []
        self._handles: dict[int, bytes] = {}  # by the ring's id

    def take(self, num_bytes: int) -> tuple[Slot, bytes]:
        """Returns a ring and its handle. All rings are of one size. Raises LinkError."""
        if not self._unused:
            ring, handle = self._gpu.allocate(num_bytes)
            self._unused.append(ring)
            self._handles[id(ring)] = handle
        ring = self._unused.pop()
        assert len(ring) == num_bytes, "an endpoint's rings are of one size"
        return ring, self._handles[id(ring)]

    def put_back(self, ring: Slot) -> None:
        self._unused.append(ring)
