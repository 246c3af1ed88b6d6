"""Moves KV out of and into a GPU's cache: queued on a separate stream, behind the steps that write it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count

import torch

from ...kernels.wire import KVPart, MovePart, WireFormat, part_bytes
from ..device import Device, DeviceEvent

_SMALLEST_BUFFER = 64


class Queued:
    """Implements `kv_transfer.interfaces.Pending`: a gather or a scatter under way."""

    def __init__(self, event: DeviceEvent, collect: Callable[[], int], memory: torch.Tensor) -> None:
        self._event = event
        self._collect = collect
        self._memory = memory  # in use until the work is done

    def is_done(self) -> bool:
        return self._event.query()

    def collect(self) -> int:
        return self._collect()


class KVQueue:
    """Queues for one cache. The engine's thread calls `mark`, the transfer's thread all else.

    A gather follows the mark that was set when the computation of its tokens had been queued. A scatter
    follows the mark that was set when its blocks were reserved: until then, a step may still write for a
    sequence that had them and has ended."""

    def __init__(
        self,
        cache: torch.Tensor,
        device: Device,
        wire_format: WireFormat,
        gather_part: MovePart,
        scatter_part: MovePart,
    ) -> None:
        self._cache, self._device, self._format = cache, device, wire_format
        self._gather_part, self._scatter_part = gather_part, scatter_part
        self._pinned, self._sums = PinnedBuffers(device), PinnedSums(device)
        self._marks: dict[int, DeviceEvent] = {}  # oldest first; those before the first have been reached
        self._numbers = count(1)

    def mark(self) -> int:
        """Names all work queued on the current stream until now. Never 0, increasing."""
        while self._marks and self._marks[oldest := next(iter(self._marks))].query():
            del self._marks[oldest]
        event, number = self._device.event(), next(self._numbers)
        event.record()
        self._marks[number] = event
        return number

    def gather(
        self, block_ids: Sequence[int], part: KVPart, out: torch.Tensor | memoryview, after: int
    ) -> Queued:
        """Gathers into `out`, on the device or in host memory; the latter is written by `collect`."""
        total = self._sums.take()
        with self._device.side_stream():
            self._come_behind(after)
            if isinstance(out, torch.Tensor):
                total.copy_(
                    self._gather_part(self._cache, block_ids, part, out, self._format), non_blocking=True
                )
                return self._queued(total, out)
            num_bytes = part_bytes(self._cache, part, self._format)
            staged = self._pinned.take(num_bytes)
            on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device.torch_device)
            total.copy_(
                self._gather_part(self._cache, block_ids, part, on_device, self._format), non_blocking=True
            )
            staged.copy_(on_device, non_blocking=True)
            return self._queued(total, staged, lambda: self._copy_out(staged, out))

    def scatter(
        self, block_ids: Sequence[int], part: KVPart, data: torch.Tensor | memoryview, after: int
    ) -> Queued:
        """The checksum covers the bytes that it wrote. Calls that may fail for lack of memory come first:
        nothing is written when it raises."""
        total = self._sums.take()
        with self._device.side_stream():
            self._come_behind(after)
            if isinstance(data, torch.Tensor):
                total.copy_(
                    self._scatter_part(self._cache, block_ids, part, data, self._format), non_blocking=True
                )
                return self._queued(total, data)
            staged = self._pinned.take(len(data))
            staged.copy_(torch.frombuffer(data, dtype=torch.uint8))
            on_device = staged.to(self._device.torch_device, non_blocking=True)
            total.copy_(
                self._scatter_part(self._cache, block_ids, part, on_device, self._format), non_blocking=True
            )
            return self._queued(total, staged, lambda: self._pinned.give_back(staged))

    def warm_up(self) -> None:
        """Compiles the kernels before any transfer waits for them: block 0 is gathered and scattered back."""
        part = KVPart(range(1), range(self._cache.shape[3]), range(self._cache.shape[4]))
        num_bytes = part_bytes(self._cache, part, self._format)
        filled = self.mark()
        with self._device.side_stream():
            self._come_behind(filled)
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device.torch_device)
            self._gather_part(self._cache, [0], part, buffer, self._format)
            self._scatter_part(self._cache, [0], part, buffer, self._format)
            event = self._device.event()
            event.record()
        event.synchronize()

    def _come_behind(self, mark: int) -> None:
        event = self._marks.get(mark)
        if event is not None:
            event.wait()

    def _queued(
        self, total: torch.Tensor, memory: torch.Tensor, finish: Callable[[], None] = lambda: None
    ) -> Queued:
        """The work ends here; `finish` follows when it is collected."""
        event = self._device.event()
        event.record()

        def collect() -> int:
            checksum = int(total.item()) & 0xFFFFFFFFFFFFFFFF
            self._sums.give_back(total)
            finish()
            return checksum

        return Queued(event, collect, memory)

    def _copy_out(self, staged: torch.Tensor, out: memoryview) -> None:
        torch.frombuffer(out, dtype=torch.uint8).copy_(staged)
        self._pinned.give_back(staged)


class PinnedSums:
    """A pool of slots for checksums in host memory."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """Returns int64 [1], with undefined content."""
        try:
            return self._free.pop()
        except IndexError:
            return self._device.pinned(torch.empty(1, dtype=torch.int64))

    def give_back(self, taken: torch.Tensor) -> None:
        """Takes back a slot from `take`, once the device no longer uses it."""
        self._free.append(taken)


class PinnedBuffers:
    """A pool of host memory for copies in both directions while the host continues: pinning takes
    milliseconds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)  # by size

    def take(self, num_bytes: int) -> torch.Tensor:
        """Returns uint8 [num_bytes], with undefined content."""
        size = 1 << (max(num_bytes, _SMALLEST_BUFFER) - 1).bit_length()
        try:
            whole = self._free[size].pop()
        except IndexError:
            whole = self._device.pinned(torch.empty(size, dtype=torch.uint8))
        return whole[:num_bytes]

    def give_back(self, taken: torch.Tensor) -> None:
        """Takes back memory from `take`, once the device no longer uses it."""
        whole = torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage())
        self._free[len(whole)].append(whole)
