"""The fake GPU detects code that waits for it, or mixes its tensors with the host's."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pdserve.kernels.triton.activation import silu_mul
from pdserve.kernels.triton.launch import Launch
from tests.fake_gpu import FakeGpuDevice, HostWaits, fake_gpu

Work = Callable[[FakeGpuDevice, torch.Tensor], object]


@pytest.fixture(params=[False, True], ids=["", "inference"], autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


@pytest.mark.parametrize(
    "work",
    [
        lambda gpu, x: x.sum().item(),
        lambda gpu, x: x.tolist(),
        lambda gpu, x: bool(x.any()),
        lambda gpu, x: int(x[0, 0]),
        lambda gpu, x: x.cpu(),
        lambda gpu, x: torch.empty(4, 6).copy_(x, non_blocking=True),
        lambda gpu, x: gpu.pinned(torch.empty(4, 6)).copy_(x),
        lambda gpu, x: torch.ones(6).to(gpu.torch_device),
        lambda gpu, x: torch.ones(6).to(gpu.torch_device, non_blocking=True),
        lambda gpu, x: gpu.pinned(torch.ones(6)).to(gpu.torch_device),
        lambda gpu, x: torch.tensor([1, 2], device=gpu.torch_device),
        lambda gpu, x: x.nonzero(),
        lambda gpu, x: torch.where(x > 0),
        lambda gpu, x: x[x > 0],
        lambda gpu, x: x.masked_select(x > 0),
        lambda gpu, x: x.unique(),
        lambda gpu, x: torch.equal(x, x),
        lambda gpu, x: x.__setitem__(x > 0, 1.0),
    ],
)
def test_code_that_waits_for_the_device_is_caught(work: Work) -> None:
    with fake_gpu() as gpu:
        x = torch.zeros(4, 6, device=gpu.torch_device)
        with pytest.raises(HostWaits):
            work(gpu, x)


@pytest.mark.parametrize(
    "work",
    [
        lambda gpu, x: x + torch.ones(6),
        lambda gpu, x: x.index_select(0, torch.tensor([1, 2])),
        lambda gpu, x: x[[1, 2]],
        lambda gpu, x: x[:, torch.tensor([1, 2])],
        lambda gpu, x: x.__setitem__([1, 2], 0.0),
        lambda gpu, x: torch.cat([x, torch.ones(4, 6)]),
        lambda gpu, x: Launch(silu_mul, (1,), {"x": x, "y": torch.empty(6), "BLOCK": 8}).run(),
    ],
)
def test_mixed_devices_are_caught(work: Work) -> None:
    with fake_gpu() as gpu:
        x = torch.zeros(4, 6, device=gpu.torch_device)
        with pytest.raises(HostWaits):
            work(gpu, x)


def test_work_that_is_queued_and_copied_aside_is_let_through() -> None:
    with fake_gpu() as gpu:
        x = gpu.pinned(torch.from_numpy(np.ones((4, 6), dtype=np.float32)))[:4].to(
            gpu.torch_device, non_blocking=True
        )
        x[1:3, 2] = x[0, 4:]
        x[:, -1] = 5.0
        x[torch.arange(2, device=gpu.torch_device)] = 0.0
        out = silu_mul((x * 2 + torch.tensor(1.0)).contiguous())
        there = gpu.pinned(torch.empty(3)).copy_(out[0], non_blocking=True)
        aside = x.to("cpu", non_blocking=True)
        assert gpu.launched == ["_gate_block"]
        assert out.device == gpu.torch_device and there.device.type == aside.device.type == "cpu"


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        (slice(None), 2),
        (..., 1),
        (None, 0),
        (1, slice(None, None, 2)),
        (Ellipsis, None, slice(2)),
    ],
)
def test_indexing_has_torchs_shapes(index: Any) -> None:
    expected = torch.zeros(4, 6, 3)[index].shape
    with fake_gpu() as gpu:
        assert torch.zeros(4, 6, 3, device=gpu.torch_device)[index].shape == expected


def test_nothing_of_it_is_left_behind() -> None:
    with fake_gpu():
        pass
    assert torch.ones(2)[torch.tensor([True, False])].tolist() == [1.0]
