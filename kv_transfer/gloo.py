"""Link between two hosts, through host memory.

Gloo aborts a receiver that is sent more than it posted, so D posts receives for the chunks that P announced
and P sends exactly those. A wait that times out makes the group permanently unusable: the side that observes
it kills the link.

A device's listening port is open to everybody who reaches it, and accepts whoever names the next sequence
number. So before a byte of KV passes, both ends prove over the new group that they are the ends of the pair's
authenticated stream."""

import hmac
import secrets
from collections.abc import Sequence
from concurrent.futures import Executor
from datetime import timedelta
from mmap import mmap
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from .group_link import GroupLink
from .link import LinkError
from .meeting import Meeting

_SECRET_BYTES = 32


class GlooLink(GroupLink):
    """A link whose ring is in host memory."""

    name = "gloo"

    def __init__(
        self,
        rank: int,
        host: str,
        num_slots: int,
        slot_bytes: int,
        timeout_s: float,
        executor: Executor,
        device: Any,
    ) -> None:
        """`device` is an `open_device(host)`, which all links of an endpoint share."""
        super().__init__(rank, host, num_slots, slot_bytes, timeout_s, executor)
        self._device = device
        # takes memory only as it is used, and no time on the endpoint's loop, which opens links
        self._ring = mmap(-1, num_slots * slot_bytes)
        self._view = memoryview(self._ring)
        self._whole: torch.Tensor | None = None

    def _build(self, meeting: Meeting) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._timeout = self.timeout
        options._threads = 0  # they would run collectives
        self._whole = torch.frombuffer(self._ring, dtype=torch.uint8)
        self._group = ProcessGroupGloo(_store(meeting, self._timeout_s), self._rank, 2, options)
        self._check_peer(meeting)
        return self._group

    def _check_peer(self, meeting: Meeting) -> None:
        """Each end leaves a secret on the authenticated stream, and gets it back over the group. Raises
        LinkError."""
        peer, mine = 1 - self._rank, secrets.token_bytes(_SECRET_BYTES)
        meeting.set(f"secret of {self._rank}", mine)
        theirs = meeting.get(f"secret of {peer}", self._timeout_s)
        if len(theirs) != _SECRET_BYTES:
            raise LinkError(f"gloo: the peer's secret has {len(theirs)} bytes, expected {_SECRET_BYTES}")
        assert self._whole is not None
        outgoing, incoming = self._whole[:_SECRET_BYTES], self._whole[_SECRET_BYTES : 2 * _SECRET_BYTES]
        self._view[:_SECRET_BYTES] = theirs
        tickets = self._group.send([outgoing], peer, 0), self._group.recv([incoming], peer, 0)
        for ticket in tickets:
            self.wait(ticket, self._timeout_s)
        if not hmac.compare_digest(self._view[_SECRET_BYTES : 2 * _SECRET_BYTES], mine):
            raise LinkError("gloo: the other end of the connection is not the peer")

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
        self._group = self._whole = self._device = None
        self.is_gone = True


def open_device(host: str) -> Any:
    """Returns a device for links: a thread, and a listening socket on a free port of `host`. Both end when
    neither the caller nor a link holds it any more. Raises LinkError."""
    try:
        return ProcessGroupGloo.create_device(hostname=host)
    except RuntimeError as error:
        raise LinkError(f"gloo: {error}") from error


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
