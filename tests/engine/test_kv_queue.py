"""The engine work behind which a gather and a scatter are queued, and the memory that they use."""

import pytest
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.messages import KVLayout
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.on_gpu.kv_queue import PinnedBuffers, Queued
from pdserve.kernels import KernelRequirements
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.kernels import TritonKernels

from ..fake_gpu import fake_gpu
from ..kv_transfer.device_doubles import LateDevice


def make_cache(wire: str = "raw", head_dim: int = 8) -> tuple[KVCache, LateDevice]:
    device = LateDevice()
    layout = KVLayout(3, 2, head_dim, "float32", 8, "model", wire)  # type: ignore[arg-type]
    cache = KVCache(layout, 6, TorchKernels(), device)
    device.waited.clear()
    return cache, device


def gather(cache: KVCache, layers: tuple[int, int], after: int = 0) -> tuple[Queued, torch.Tensor]:
    out = torch.zeros((layers[1] - layers[0]) * 8 * cache.layout.wire_bytes_per_cell, dtype=torch.uint8)
    queued = cache.gather(*layers, [1], 0, 8, out, after)
    assert isinstance(queued, Queued)
    return queued, out


def test_a_gather_and_a_scatter_follow_exactly_their_mark() -> None:
    cache, device = make_cache()
    device.hold()
    before = device.recorded()
    marks = [cache.mark() for _ in range(3)]
    assert marks == sorted(set(marks)) and marks[0] > 0
    _, data = gather(cache, (1, 2), after=marks[1])
    cache.scatter(1, 2, [3], 0, 8, data, marks[0])
    assert device.waited == [before + 2, before + 1]


def test_work_behind_a_reached_mark_waits_for_nothing() -> None:
    cache, device = make_cache()
    mark = cache.mark()
    cache.mark()  # drops marks that have been reached
    gather(cache, (1, 2), after=mark)
    assert not device.waited


def test_a_cpu_cache_has_no_marks() -> None:
    assert KVCache(KVLayout(3, 2, 8, "float32", 8, "model"), 6, TorchKernels()).mark() == 0


def test_a_cache_that_runs_ahead_reports_checksums_through_its_works() -> None:
    cache, _ = make_cache("int8")
    queued, data = gather(cache, (0, 2))
    assert queued.is_done() and cache.checksum(data) is None
    scattered = cache.scatter(0, 2, [2], 0, 8, data)
    assert scattered is not None and scattered.collect() == queued.collect()


@pytest.mark.parametrize("wire", ["raw", "int8"])
def test_a_cache_created_in_inference_mode_is_writable_outside_it(wire: str) -> None:
    layout = KVLayout(3, 2, 8, "float32", 8, "model", wire)  # type: ignore[arg-type]
    with torch.inference_mode():
        cache = KVCache(layout, 6, TorchKernels())
    data = memoryview(bytearray(8 * layout.wire_bytes_per_token))
    cache.scatter(0, 3, [2], 0, 8, data)
    assert cache.gather(0, 3, [2], 0, 8, data) == cache.checksum(data)


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("ring", ["device", "host"])
def test_the_host_continues_while_a_gpu_gathers_and_scatters(wire: str, ring: str) -> None:
    layout = KVLayout(3, 2, 16, "bfloat16", 8, "model", wire)  # type: ignore[arg-type]
    num_bytes = 2 * 5 * layout.wire_bytes_per_cell
    with fake_gpu() as device:
        kernels = TritonKernels(KernelRequirements(torch.bfloat16, 16, 8))
        cache = KVCache(layout, 6, kernels, device)
        slot = (
            torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
            if ring == "device"
            else memoryview(bytearray(num_bytes))
        )
        assert isinstance(cache.gather(1, 3, [4, 2], 6, 11, slot, cache.mark()), Queued)
        assert isinstance(cache.scatter(1, 3, [4, 2], 6, 11, slot, cache.mark()), Queued)


def test_pinned_memory_is_reused_when_it_is_given_back() -> None:
    buffers = PinnedBuffers(LateDevice())
    first = buffers.take(100)
    other = buffers.take(100)
    assert len(first) == len(other) == 100 and first.data_ptr() != other.data_ptr()
    buffers.give_back(first)
    assert buffers.take(128).data_ptr() == first.data_ptr()
    assert buffers.take(129).data_ptr() != first.data_ptr()


def test_int8_requires_whole_words() -> None:
    with pytest.raises(ConfigError, match="got 'int8', expected 'raw' for a head_dim of 12"):
        make_cache("int8", head_dim=12)
