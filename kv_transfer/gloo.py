"""Link between two hosts, through host memory.

Gloo aborts a receiver that is sent more than it posted, so D posts receives for the chunks that P announced
and P sends exactly those. A wait that times out makes the group permanently unusable: the side that observes
it kills the link."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from .group_link import GroupLink
from .meeting import Meeting


class GlooLink(GroupLink):
    """A link whose ring is in host memory."""

    name = "gloo"

    def __init__(self, rank: int, host: str, num_slots: int, slot_bytes: int, timeout_s: float) -> None:
        super().__init__(rank, host, num_slots, slot_bytes, timeout_s)
        self._ring = bytearray(num_slots * slot_bytes)
        self._view = memoryview(self._ring)
        self._whole: torch.Tensor | None = None

    def _build(self, meeting: Meeting) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = self.timeout
        options._threads = 1
        self._whole = torch.frombuffer(self._ring, dtype=torch.uint8)
        return ProcessGroupGloo(_store(meeting, self._timeout_s), self._rank, 2, options)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def _tensor(self, slot: int, num_bytes: int) -> torch.Tensor:
        assert self._whole is not None
        return self._whole.narrow(0, slot * self.slot_bytes, num_bytes)

    def wait(self, ticket: Any, timeout_s: float) -> None:
        with self._errors():
            ticket.wait(timedelta(seconds=timeout_s))

    def _release(self) -> None:
        self._group = self._whole = None
        self.is_gone = True


def _store(meeting: Meeting, timeout_s: float) -> Any:
    """Adapts the meeting to the interface that torch's gloo expects."""

    class MeetingStore(Store):
        def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # the stubs say text
            meeting.set(key, bytes(value))

        def get(self, key: str) -> bytes:
            return meeting.get(key, timeout_s)

        def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                meeting.get(key, timeout_s if timeout is None else timeout.total_seconds())

    return MeetingStore()
