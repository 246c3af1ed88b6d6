"""A device whose stream is a thread: gathers, scatters and non-blocking copies run on it, in order, while the
host continues. Code that reads a result before its event, or reuses memory that a copy still needs, finds
wrong bytes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pdserve.engine.device import HostDevice
from pdserve.kernels.wire import KVPart, MovePart, WireFormat

from .support import WAIT_S

JUNK = 0xA5  # in memory that the device has yet to write


class StreamEvent:
    def __init__(self, device: "StreamDevice") -> None:
        self._device = device
        self._reached: Future[None] | None = None

    def record(self) -> None:
        self._reached = self._device.queue(lambda: None)

    def wait(self) -> None:
        """There is only one stream."""

    def synchronize(self) -> None:
        if self._reached is not None:
            self._reached.result(WAIT_S)

    def query(self) -> bool:
        return self._reached is None or self._reached.done()


class StreamDevice(HostDevice):
    """A stream whose work may be held up."""

    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self._stream = ThreadPoolExecutor(1, thread_name_prefix="double-stream")
        self._may_work = threading.Event()
        self._may_work.set()
        self._pinned: set[int] = set()  # start addresses of such memory
        self.num_copies = 0  # between the device and pinned memory
        self._has_copies = threading.Event()

    def event(self) -> StreamEvent:
        return StreamEvent(self)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        with _Deferred(self):
            yield

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.clone()
        self._pinned.add(copied.untyped_storage().data_ptr())
        return copied

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def queue(self, work: Callable[[], object]) -> "Future[None]":
        def run() -> None:
            assert self._may_work.wait(WAIT_S), "nobody let the device go on"
            work()

        return self._stream.submit(run)

    def hold(self) -> None:
        self._may_work.clear()

    def go_on(self) -> None:
        self._may_work.set()

    def count_copy(self) -> None:
        self.num_copies += 1
        self._has_copies.set()

    def wait_for_copies(self) -> None:
        """Waits until the first one is queued."""
        assert self._has_copies.wait(WAIT_S), "nothing was queued"

    def close(self) -> None:
        self.go_on()
        self._stream.shutdown()

    def late(self, move: MovePart) -> MovePart:
        """Launches the same kernel: its sum is there when the stream has reached it."""

        def launch(
            cache: torch.Tensor,
            block_ids: Sequence[int],
            part: KVPart,
            buffer: torch.Tensor,
            wire: WireFormat,
        ) -> torch.Tensor:
            assert not self.is_pinned(buffer), "a kernel was given the host's memory"
            total, ids = torch.zeros(1, dtype=torch.int64), list(block_ids)
            self.queue(lambda: total.copy_(move(cache, ids, part, buffer, wire)))
            return total

        return launch


class _Deferred(TorchFunctionMode):
    """Queues the work that a GPU's stream would: copies with `non_blocking`, of which one side is pinned
    memory."""

    def __init__(self, device: StreamDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            return self._copy(args[0], args[1])
        if func is torch.Tensor.to and kwargs.get("non_blocking"):
            return self._copy(torch.full_like(args[0], JUNK), args[0])
        return func(*args, **kwargs)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        assert self._device.is_pinned(target) != self._device.is_pinned(source), (
            "one side is pinned, the other a device's"
        )
        self._device.count_copy()
        if target.dtype == torch.uint8:
            target.fill_(JUNK)
        self._device.queue(lambda: target.copy_(source))
        return target
