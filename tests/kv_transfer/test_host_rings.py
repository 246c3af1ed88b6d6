"""KV of devices through host memory: pinned copies, over a link within a host and one between hosts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from pdserve.core.request import TransferId
from pdserve.kernels.reference import TorchKernels

from .device_doubles import SharedMemory, WatchedCache, device_layout
from .leftovers import T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .stream_device import StreamDevice
from .support import CALM, Worker

THEIRS, OURS = [5, 1, 9, 2], [3, 11, 4, 7]
NUM_TOKENS = 29
# of a page: every chunk takes what the one before it gave back
ONE_SLOT = replace(CALM, chunk_bytes=2048, ring_slots=1)


class StreamWorker(Worker):
    store: WatchedCache

    def __init__(self, name: str, wire: Any, transport: str, seed: int | None = None) -> None:
        self.device = StreamDevice()
        layout = device_layout(wire)
        store = WatchedCache(layout, TorchKernels(), self.device)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            store._data.copy_(torch.randn(store._data.shape, generator=generator))
        queue = store._queue
        assert queue is not None
        queue._gather_part, queue._scatter_part = (
            self.device.late(move) for move in (queue._gather_part, queue._scatter_part)
        )
        super().__init__(
            name, layout, transport=transport, config=ONE_SLOT, store=store, gpu=SharedMemory(f"GPU-{name}")
        )

    def close(self) -> None:
        self.device.go_on()
        self.endpoint.close()
        self.device.close()


@contextmanager
def devices(wire: str = "raw", transport: str = "shm") -> Iterator[tuple[StreamWorker, StreamWorker]]:
    """Yields P with random KV, D with zeros."""
    sender, receiver = StreamWorker("p", wire, transport, seed=1), StreamWorker("d", wire, transport)
    try:
        yield sender, receiver
    finally:
        sender.close()
        receiver.close()


def push(sender: StreamWorker, receiver: StreamWorker, transfer: TransferId = T) -> None:
    receiver.expect(transfer, sender.key, OURS, NUM_TOKENS)
    sender.push(transfer, receiver.address, THEIRS, NUM_TOKENS, b"payload")


def assert_arrived(sender: StreamWorker, receiver: StreamWorker) -> None:
    sent, got = sender.store.tokens(THEIRS, 0, NUM_TOKENS), receiver.store.tokens(OURS, 0, NUM_TOKENS)
    if sender.store.layout.wire == "raw":
        assert torch.equal(got, sent)
    else:  # half a step of 127 to a row's largest value, and bfloat16's own rounding
        assert ((got - sent).abs() <= sent.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-8) * 1.0001).all()


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_kv_goes_from_device_to_device_by_pinned_copies(wire: str, transport: str) -> None:
    with devices(wire, transport) as (sender, receiver):
        push(sender, receiver)
        assert receiver.ends.received(T) == b"payload"
        num_chunks = sender.ends.sent(T).num_chunks
        assert num_chunks > 1, "buffers are to be used more than once"
        assert_arrived(sender, receiver)
        for worker in (sender, receiver):
            assert worker.device.num_copies == 2 * num_chunks, "a chunk and its sum, each"


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("held", ["sender", "receiver"])
def test_nothing_is_reported_before_the_copies_are_done(wire: str, held: str) -> None:
    with devices(wire) as (sender, receiver):
        late = sender if held == "sender" else receiver
        late.device.hold()
        push(sender, receiver)
        other = TransferId("other", 0)
        receiver.expect(other, sender.key, [0], 8, cached=8)
        sender.push(other, receiver.address, [0], 8)
        receiver.ends.received(other)  # nothing of it is on a device, so it passes by
        assert ("receive", T) not in receiver.ends.endings and ("send", T) not in sender.ends.endings
        late.device.go_on()
        assert receiver.ends.received(T) == b"payload"
        assert_arrived(sender, receiver)


def test_a_transfer_cancelled_during_its_copies_returns_its_buffers() -> None:
    with devices() as (sender, receiver):
        receiver.device.hold()
        push(sender, receiver)
        receiver.device.wait_for_copies()
        receiver.endpoint.cancel(T)
        assert sender.ends.send_error(T) == "cancelled"
        receiver.device.go_on()
        assert receiver.ends.receive_error(T) == "cancelled"
        receiver.store.writable |= set(OURS)
        second = TransferId("second", 0)
        push(sender, receiver, second)
        receiver.ends.received(second)
        assert_arrived(sender, receiver)
        assert sender.endpoint.counters.num_links_opened == 1
