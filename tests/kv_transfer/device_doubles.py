"""Test doubles of a GPU on the CPU: a queue that completes when a test lets it, and memory that two endpoints
share."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch

from pdserve.core.messages import KVLayout
from pdserve.core.request import TransferId
from pdserve.engine.device import HostDevice
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels import Kernels
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.launch import Launch
from pdserve.kv_transfer import TransferConfig

from .support import CALM, WAIT_S, Worker

NUM_BLOCKS = 24


@contextmanager
def one_kernel_at_a_time() -> Iterator[None]:
    """Triton's interpreter supports one running program per process; transfers have threads of their own."""
    lock, run = threading.Lock(), Launch.run

    def run_alone(launch: Launch) -> None:
        with lock:
            run(launch)

    with patch.object(Launch, "run", run_alone):
        yield


class LateEvent:
    """Reached when the test has let its device proceed to it."""

    def __init__(self, device: "LateDevice") -> None:
        self._device = device
        self.place = 0

    def record(self) -> None:
        self.place = self._device.recorded()

    def wait(self) -> None:
        self._device.waited.append(self.place)

    def synchronize(self) -> None:
        self._device.catch_up()

    def query(self) -> bool:
        return self._device.has_reached(self.place)


class LateDevice(HostDevice):
    """Work is done when it is queued, as on the CPU, but is not reported before its event is reached."""

    runs_ahead = True

    def __init__(self) -> None:
        self.waited: list[int] = []  # places that work was queued behind
        self.error: Exception | None = None
        self._lags = False
        self._places = count(1)
        self._recorded = self._reached = 0
        self._num_late = 0  # works of the side stream
        self._in_side_stream = False  # where the transfer's thread is; the engine's never is
        self._changed = threading.Condition()

    def event(self) -> LateEvent:
        return LateEvent(self)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self._in_side_stream = True
        try:
            yield
        finally:
            self._in_side_stream = False

    def recorded(self) -> int:
        with self._changed:
            self._num_late += self._lags and self._in_side_stream
            self._recorded = next(self._places)
            self._reached = self._reached if self._lags else self._recorded
            self._changed.notify_all()
            return self._recorded

    def has_reached(self, place: int) -> bool:
        if self.error is not None:
            raise self.error
        return place <= self._reached

    def hold(self) -> None:
        """Makes all work that is queued from now on late."""
        with self._changed:
            self._lags, self._num_late = True, 0

    def catch_up(self) -> None:
        with self._changed:
            self._lags, self._reached = False, self._recorded

    def wait_for_work(self, num_works: int = 1) -> None:
        """Waits until `num_works` works are late."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_late >= num_works, WAIT_S), "nothing was queued"


class SharedMemory:
    """Implements `interfaces.Gpu`: a handle is valid for every endpoint of this process."""

    _given: dict[bytes, torch.Tensor] = {}  # noqa: RUF012  (what a driver keeps)

    def __init__(self, uuid: str = "GPU-0") -> None:
        self.uuid = uuid
        self.device = torch.device("cpu")

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        memory, handle = torch.zeros(num_bytes, dtype=torch.uint8), len(self._given).to_bytes(8, "little")
        self._given[handle] = memory
        return memory, handle

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        return self._given[handle][:num_bytes]


class WatchedCache(KVCache):
    """Tracks which blocks may still be written; can be made to corrupt the bytes that it gathers."""

    def __init__(self, layout: KVLayout, kernels: Kernels, device: HostDevice) -> None:
        super().__init__(layout, NUM_BLOCKS, kernels, device)
        self.writable = set(range(NUM_BLOCKS))
        self.lies = False

    def gather(self, *where: Any) -> Any:
        gathered: Any = super().gather(*where)
        if self.lies:
            honest = gathered.collect
            gathered.collect = lambda: honest() ^ 1
        return gathered

    def scatter(self, layer_start: int, layer_end: int, block_ids: Sequence[int], *rest: Any) -> Any:
        assert set(block_ids) <= self.writable, "blocks were written after their transfer had ended"
        return super().scatter(layer_start, layer_end, block_ids, *rest)

    def tokens(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Returns [layers, 2, Hkv, tokens, D] as float32."""
        blocks = self._data[:, :, list(block_ids)].transpose(2, 3)  # [layers, 2, Hkv, blocks, block_size, D]
        return blocks.flatten(3, 4)[..., start:end, :].float()


def device_layout(wire: Any = "raw", dtype: str = "bfloat16", block_size: int = 8) -> KVLayout:
    return KVLayout(3, 2, 16, dtype, block_size, "m", wire)


class DeviceWorker(Worker):
    """An endpoint over a cache on a `LateDevice`, or on the CPU."""

    store: WatchedCache

    def __init__(
        self,
        name: str,
        kv_layout: KVLayout,
        *,
        kernels: Kernels | None = None,
        on_gpu: bool = True,
        seed: int | None = None,
        transport: str = "auto",
        config: TransferConfig = CALM,
        gpu: SharedMemory | None = None,
    ) -> None:
        self.device = LateDevice()
        store = WatchedCache(kv_layout, kernels or TorchKernels(), self.device if on_gpu else HostDevice())
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            store._data.copy_(torch.randn(store._data.shape, generator=generator))
        gpu = gpu or (SharedMemory() if on_gpu else None)
        super().__init__(name, kv_layout, transport=transport, config=config, store=store, gpu=gpu)

    def settle(self) -> None:
        """Returns when the endpoint has carried out its earlier requests, as far as it can."""
        done = threading.Event()
        self.endpoint._post(done.set)
        assert done.wait(WAIT_S)

    def has_ended(self, side: str, transfer: TransferId) -> bool:
        self.settle()
        return (side, transfer) in self.ends.endings
