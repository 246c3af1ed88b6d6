"""Link between two GPUs, within a host or between hosts.

Sends and receives are queued on a stream of the group's; the bytes have left, or have arrived, when the
operation's event is reached. An operation whose peer is gone never completes: the pair's control stream
reports the loss, and `kill` aborts the operation. Torch's watchdog would end the process, so it is disabled
and reports no failure to any group.

Operations of several groups on one GPU can wait for one another in a circle, where their streams share one of
the device's queues. So a sender has chunks under way to one peer at a time (`send_turn.py`), and D posts
receives only for announced chunks."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .group_link import GroupLink
from .interfaces import Slot
from .link import LinkError, PeerLost, TransferTimeout
from .meeting import SENDER_RANK, Meeting
from .sockets import listening_socket

ABORT_S = 5.0  # an abort that takes longer is stuck in the driver
_POLL_S = 20e-6
_HELLO_BYTES = 8
_STORE = "store"  # the entry with the store's address
_NO_ERROR = "SUCCESS"  # of torch's `ErrorType`


class NcclLink(GroupLink):
    """A link whose ring is in GPU memory. `on_stuck` is called with the reason why this process cannot go
    on."""

    name = "nccl"
    takes_turns = True

    def __init__(
        self,
        rank: int,
        host: str,
        num_slots: int,
        slot_bytes: int,
        timeout_s: float,
        executor: Executor,
        device: torch.device,
        on_stuck: Callable[[str], None],
    ) -> None:
        super().__init__(rank, host, num_slots, slot_bytes, timeout_s, executor)
        self._stream = own_stream(device) if device.type == "cuda" else None
        with self._own_stream():
            self._ring: torch.Tensor | None = torch.empty(
                num_slots * slot_bytes, dtype=torch.uint8, device=device
            )
        self._store: TCPStore | None = None
        self._on_stuck = on_stuck
        self._killed = threading.Event()
        self._released = threading.Event()

    def slot(self, slot: int, num_bytes: int) -> Slot:
        return self._tensor(slot, num_bytes)

    def _tensor(self, slot: int, num_bytes: int) -> torch.Tensor:
        assert self._ring is not None, "it goes with the link"
        return self._ring.narrow(0, slot * self.slot_bytes, num_bytes)

    def _build(self, meeting: Meeting) -> Any:
        """NCCL connects at the first operation, and waits there for the peer without a limit: so both sides
        first announce that they are there, and then exchange a few bytes."""
        store = self._store = self._meet(meeting)
        store.set(f"rank {self._rank}", "here")
        store.wait([f"rank {1 - self._rank}"], self.timeout)
        if self._killed.is_set():
            raise LinkError("nccl: the link was killed")
        self._group = group = make_group(store, self._rank, self.timeout)
        hello = self._tensor(0, _HELLO_BYTES)
        peer = 1 - self._rank
        with self._own_stream():
            ticket = (
                group.send([hello], peer, 0) if self._rank == SENDER_RANK else group.recv([hello], peer, 0)
            )
        self.wait(ticket, self._timeout_s)
        return group

    def _meet(self, meeting: Meeting) -> TCPStore:
        """Returns a store that D serves: NCCL groups keep using theirs, on threads of their own."""
        if self._rank == SENDER_RANK:
            host, _, port = meeting.get(_STORE, self._timeout_s).decode().rpartition(" ")
            return TCPStore(host, int(port), 2, False, self.timeout)
        listener = listening_socket(self._host)
        port = listener.getsockname()[1]
        fd = listener.detach()
        store = TCPStore(self._host, port, 2, True, self.timeout, wait_for_workers=False, master_listen_fd=fd)
        meeting.set(_STORE, f"{self._host} {port}".encode())
        return store

    def send(self, slot: int, num_bytes: int, seq: int) -> Any:
        with self._own_stream():
            return super().send(slot, num_bytes, seq)

    def recv(self, slot: int, num_bytes: int, seq: int) -> Any:
        with self._own_stream():
            return super().recv(slot, num_bytes, seq)

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self, ticket: Any, timeout_s: float) -> None:
        due_s = time.monotonic() + timeout_s
        with self._errors():
            while not ticket.is_completed():
                if self._killed.is_set():
                    raise LinkError("nccl: the link was killed")
                if time.monotonic() > due_s:
                    raise TransferTimeout(f"nccl: not done within {timeout_s} s")
                time.sleep(_POLL_S)
        self._check_group()

    def _check_group(self) -> None:
        """Raises PeerLost when an operation of the group has failed, which torch reports as completed.
        Torch's watchdog reports it up to a tenth of a second later; a chunk that is received meanwhile fails
        its checksum. For builds of torch without `get_error`, detection relies on that and on the control
        stream."""
        get_error = getattr(self._group, "get_error", None)
        if get_error is not None and (error := get_error().name) != _NO_ERROR:
            raise PeerLost(f"nccl: an operation failed ({error})")

    def kill(self) -> None:
        self._killed.set()
        super().kill()

    def _release(self) -> None:
        """Aborts pending operations: only then is the ring free. After an abort that hangs, the process has
        to end."""
        watch = threading.Timer(ABORT_S, self._on_stuck, (f"nccl: a link did not let go within {ABORT_S} s",))
        watch.daemon = True
        watch.start()
        try:
            if self._group is not None:
                self._group.abort()
        finally:
            watch.cancel()
            self._group = self._store = self._ring = None
            self.is_gone = True
            self._released.set()

    def join(self) -> None:
        """An abort that hangs in the driver, while the link is built, is left behind."""
        self._released.wait(ABORT_S)


@cache
def own_stream(device: torch.device) -> Any:
    """Returns a stream whose operations follow the work queued on the current stream, not the engine's steps,
    and never use the engine's memory. Torch has 32 streams of a priority and hands them out in turn: the
    engine takes one of this priority, for the gathers and scatters that are next to it."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def make_group(store: Any, rank: int, timeout: timedelta) -> Any:
    """A separate two-rank group on the process' GPU."""
    os.environ |= {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }  # both end the process
    from torch.distributed import ProcessGroupNCCL  # torch's CUDA builds have it

    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, 2, options)
