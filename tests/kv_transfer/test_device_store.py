"""Caches on a late device: announcements and reports, and their timing, over real links and a test double of
a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from pdserve.core.request import TransferId
from pdserve.kernels import KernelRequirements, Kernels
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kv_transfer import TransferConfig

from .device_doubles import DeviceWorker, device_layout, one_kernel_at_a_time
from .leftovers import T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .support import CALM

SECOND = TransferId("second", 0)
THEIRS, OURS = [5, 1, 9, 2], [3, 11, 4, 7]
NUM_TOKENS = 29
ONE_SLOT = replace(CALM, chunk_bytes=1 << 16, ring_slots=1)


@contextmanager
def devices(
    wire: str = "raw",
    *,
    on_gpu: tuple[bool, bool] = (True, True),
    transport: str = "auto",
    config: TransferConfig = CALM,
    kernels: Kernels | None = None,
    dtype: str = "bfloat16",
) -> Iterator[tuple[DeviceWorker, DeviceWorker]]:
    """Yields P with random KV, D with zeros, of other block sizes; both are closed at the end."""
    common: dict[str, Any] = {"transport": transport, "config": config, "kernels": kernels}
    sender = DeviceWorker("p", device_layout(wire, dtype), on_gpu=on_gpu[0], seed=1, **common)
    receiver = DeviceWorker("d", device_layout(wire, dtype, 16), on_gpu=on_gpu[1], **common)
    try:
        yield sender, receiver
    finally:
        sender.device.catch_up()
        receiver.device.catch_up()
        sender.endpoint.close()
        receiver.endpoint.close()


def push(sender: DeviceWorker, receiver: DeviceWorker, transfer: TransferId = T) -> None:
    receiver.expect(transfer, sender.key, OURS, NUM_TOKENS)
    sender.push(transfer, receiver.address, THEIRS, NUM_TOKENS, b"payload")


def assert_arrived(sender: DeviceWorker, receiver: DeviceWorker) -> None:
    """Compares bit for bit, or within int8 rounding: half a step of 127 to the row's largest value, and then
    to the cache's own type."""
    sent, got = sender.store.tokens(THEIRS, 0, NUM_TOKENS), receiver.store.tokens(OURS, 0, NUM_TOKENS)
    if sender.store.layout.wire == "raw":
        assert torch.equal(got, sent)
    else:
        bound = sent.abs().amax(-1, keepdim=True) * (
            0.5 / 127 + (0 if sender.store.layout.dtype == "float32" else 2**-8)
        )
        assert ((got - sent).abs() <= bound * 1.0001).all() and not torch.equal(got, sent)
    assert not receiver.store.tokens(OURS, NUM_TOKENS, 32).any()


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "gloo"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kv_goes_from_device_to_device(wire: str, transport: str, dtype: str) -> None:
    with devices(wire, transport=transport, dtype=dtype) as (sender, receiver):
        push(sender, receiver)
        assert receiver.ends.received(T) == b"payload"
        assert sender.ends.sent(T).num_bytes == NUM_TOKENS * sender.store.layout.wire_bytes_per_token
        assert_arrived(sender, receiver)


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("on_gpu", [(True, False), (False, True), (False, False)])
def test_a_device_and_a_cpu_meet_in_host_memory(wire: str, on_gpu: tuple[bool, bool]) -> None:
    with devices(wire, on_gpu=on_gpu) as (sender, receiver):
        push(sender, receiver)
        assert receiver.ends.received(T) == b"payload"
        assert_arrived(sender, receiver)


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "shm"])
def test_tritons_kernels_move_kv(wire: str, transport: str) -> None:
    kernels = TritonKernels(KernelRequirements(torch.bfloat16, 16, 8))
    with one_kernel_at_a_time(), devices(wire, transport=transport, kernels=kernels) as (sender, receiver):
        push(sender, receiver)
        assert receiver.ends.received(T) == b"payload"
        assert_arrived(sender, receiver)


def test_different_wire_formats_are_refused() -> None:
    sender, receiver = (
        DeviceWorker("p", device_layout("int8"), seed=1),
        DeviceWorker("d", device_layout("raw")),
    )
    try:
        push(sender, receiver)
        assert "the KV layouts differ in wire: 'raw' here, 'int8' there" in sender.ends.send_error(T)
    finally:
        sender.endpoint.close()
        receiver.endpoint.close()


def test_nothing_is_reported_before_the_device_is_done() -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        sender.device.hold()
        receiver.device.hold()
        push(sender, receiver)
        sender.device.wait_for_work()
        assert not receiver.has_ended("receive", T)
        sender.device.catch_up()
        receiver.device.wait_for_work()
        assert not receiver.has_ended("receive", T) and not sender.has_ended("send", T)
        receiver.device.catch_up()
        assert receiver.ends.received(T) == b"payload"
        assert_arrived(sender, receiver)


def test_a_transfer_cancelled_during_its_gather_frees_its_slot() -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        sender.device.hold()
        push(sender, receiver)
        sender.device.wait_for_work()
        sender.endpoint.cancel(T)
        assert receiver.ends.receive_error(T) == "cancelled"
        assert not sender.has_ended("send", T)
        sender.device.catch_up()
        assert sender.ends.send_error(T) == "cancelled"
        receiver.store.writable |= set(OURS)
        push(sender, receiver, SECOND)
        receiver.ends.received(SECOND)
        assert_arrived(sender, receiver)
        assert sender.endpoint.counters.num_links_opened == 1
        assert receiver.endpoint.counters.num_stale_messages == 0, (
            "a chunk of a transfer that had ended was announced"
        )


def test_blocks_are_not_freed_while_the_device_writes_to_them() -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        receiver.device.hold()
        push(sender, receiver)
        receiver.device.wait_for_work()
        receiver.endpoint.cancel(T)
        assert sender.ends.send_error(T) == "cancelled"
        assert not receiver.has_ended("receive", T)
        receiver.device.catch_up()
        assert receiver.ends.receive_error(T) == "cancelled"
        receiver.store.writable |= set(OURS)
        push(sender, receiver, SECOND)
        receiver.ends.received(SECOND)
        assert sender.endpoint.counters.num_links_opened == 1


def test_a_link_that_breaks_during_a_gather_does_not_affect_the_next() -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        sender.device.hold()
        push(sender, receiver)
        sender.device.wait_for_work()
        pair = next(iter(sender.endpoint._hub._outbound.values()))
        sender.endpoint._post(lambda: pair._link_failed(pair._epoch or 0, "broken"))
        assert receiver.ends.receive_error(T) == "the peer closed the connection"
        assert not sender.has_ended("send", T)
        receiver.store.writable |= set(OURS)
        push(sender, receiver, SECOND)
        sender.device.wait_for_work(2)
        sender.device.catch_up()
        assert sender.ends.send_error(T) == "broken"
        receiver.ends.received(SECOND)
        assert_arrived(sender, receiver)
        counters = receiver.endpoint.counters
        assert counters.num_links_opened == 2 and counters.num_nacks == 0 and counters.num_stale_messages == 0


def test_wrong_bytes_end_the_link_once_the_device_is_done() -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        sender.store.lies = True
        push(sender, receiver)
        assert "do not have the announced checksum" in receiver.ends.receive_error(T)
        assert "do not have the announced checksum" in sender.ends.send_error(T)
        assert receiver.endpoint.counters.num_nacks == 1
        sender.store.lies = False
        receiver.store.writable |= set(OURS)
        push(sender, receiver, SECOND)
        receiver.ends.received(SECOND)
        assert_arrived(sender, receiver)


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_device_error_ends_the_transfer_but_not_the_link(side: str) -> None:
    with devices(config=ONE_SLOT) as (sender, receiver):
        failing = sender if side == "send" else receiver
        failing.device.hold()
        push(sender, receiver)
        failing.device.wait_for_work()
        failing.device.error = RuntimeError("CUDA error")
        what = "gathering" if side == "send" else "scattering"
        assert f"{what} failed: RuntimeError('CUDA error')" in sender.ends.send_error(T)
        assert f"{what} failed: RuntimeError('CUDA error')" in receiver.ends.receive_error(T)
        failing.device.error = None
        failing.device.catch_up()
        receiver.store.writable |= set(OURS)
        push(sender, receiver, SECOND)
        receiver.ends.received(SECOND)
        assert sender.endpoint.counters.num_links_opened == 1


def test_close_does_not_wait_for_a_device_indefinitely() -> None:
    with devices(config=replace(CALM, chunk_bytes=1 << 16, chunk_timeout_s=0.05)) as (sender, receiver):
        sender.device.hold()
        push(sender, receiver)
        sender.device.wait_for_work()
        sender.endpoint.close()
        assert sender.ends.send_error(T)
