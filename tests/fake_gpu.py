"""A GPU for code that only queues work: its tensors have shapes, types and a device, and no contents.

Inside `fake_gpu()` host tensors are real and CUDA tensors are torch's fake ones, so that whatever would fail on a GPU for the
place of a tensor fails here: operations on tensors of both, kernels that are given host memory, and every wait of the host for
the device's results. Kernels are not run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdserve.engine import decode_graphs
from pdserve.engine.device import HostDevice
from pdserve.kernels.triton import paged_attention
from pdserve.kernels.triton.launch import Launch

_NUM_MULTIPROCESSORS = 132
_aten = torch.ops.aten


class HostWaits(AssertionError):
    """The host waits for the device, or gives it host memory to work on."""


class FakeGpuDevice(HostDevice):
    """Its tensors are on the fake GPU."""

    torch_device = torch.device("cuda", 0)
    runs_ahead = True


class _FakeGpu(TorchDispatchMode):
    """Above torch's own fake mode: decides what of an operation is on the host, and does that for real."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim()]
        device = kwargs.get("device")
        is_to = func.overloadpacket in (_aten.to, _aten._to_copy)
        target = torch.device(device) if device is not None else None
        if func is _aten.copy_.default and there:
            return self._copy(*args, **kwargs)
        if is_to and there and target is not None and target.type == "cpu":
            raise HostWaits(f"{func} of a tensor on the device to the host")
        if is_to and here and target is not None and target.type == "cuda":
            dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), args[0].dtype)
            return torch.empty(args[0].shape, dtype=dtype, device=target)
        if there and here:
            raise HostWaits(f"{func} of tensors on the host and on the device")
        if there or (target is not None and target.type == "cuda"):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(to, FakeTensor) and isinstance(source, FakeTensor):
            return _aten.copy_.default(to, source, non_blocking)  # type: ignore[no-any-return]
        if to.shape != source.shape:
            raise RuntimeError(f"copy_: {tuple(source.shape)} to {tuple(to.shape)}")
        if not non_blocking:
            raise HostWaits("copy_ between the host and the device")
        return to


@contextmanager
def fake_gpu() -> Iterator[FakeGpuDevice]:
    """A GPU of compute capability 9.0, without contents. Kernels check their tensors' device and do nothing else."""
    patches = [
        patch.object(Launch, "run", _check_launch),
        patch.object(torch.Tensor, "pin_memory", lambda self: self),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # These would look for the driver before they come to the dispatcher.
        patch.object(torch.Tensor, "copy_", _copy),
        patch.object(torch.Tensor, "__getitem__", _get(torch.Tensor.__getitem__)),
        patch.object(torch.Tensor, "__setitem__", _set(torch.Tensor.__setitem__)),
        *(patch.object(module, "num_multiprocessors", lambda device: _NUM_MULTIPROCESSORS) for module in _USERS),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_FakeGpu())
        yield FakeGpuDevice()


_USERS = (paged_attention, decode_graphs)  # of the number of multiprocessors


def _check_launch(launch: Launch) -> None:
    for name, argument in launch.arguments.items():
        if isinstance(argument, torch.Tensor) and argument.device.type != "cuda":
            raise HostWaits(f"{launch.kernel}: {name} is on {argument.device}")


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _aten.copy_.default(self, source, non_blocking)  # type: ignore[no-any-return]


def _get(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def get(self: torch.Tensor, index: Any) -> torch.Tensor:
        return _index(self, index) if isinstance(self, FakeTensor) else real(self, index)

    return get


def _set(real: Callable[..., None]) -> Callable[..., None]:
    def set_(self: torch.Tensor, index: Any, value: Any) -> None:
        if not isinstance(self, FakeTensor):
            real(self, index, value)
        elif isinstance(value, torch.Tensor):
            _index(self, index).copy_(value)
        else:
            _index(self, index).fill_(value)

    return set_


def _index(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    out, dim = tensor, 0
    indices: list[torch.Tensor | None] = []
    for item in index if isinstance(index, tuple) else (index,):
        match item:
            case None:
                out, dim = _aten.unsqueeze(out, dim), dim + 1
            case int():
                out = _aten.select.int(out, dim, item)
            case slice():
                out, dim = _aten.slice.Tensor(out, dim, item.start, item.stop, item.step or 1), dim + 1
            case torch.Tensor() if item.dtype is not torch.bool:
                indices += [*[None] * (dim - len(indices)), item]
                dim += 1
            case _:
                raise HostWaits(f"a tensor on the device is indexed by {item}")
    return _aten.index.Tensor(out, indices) if indices else out
