"""A GPU for code that only queues work: its tensors have shapes, types and a device, and no contents.

Inside `fake_gpu()` host tensors are real and CUDA tensors are torch's fake ones, so that whatever would fail
on a GPU for the place of a tensor fails here: operations on tensors of both, kernels that are given host
memory, and every wait of the host for the device's results, or for a copy. Kernels are not run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdserve.engine.device import HostDevice
from pdserve.engine.on_gpu import decode_graphs
from pdserve.kernels.triton import paged_attention
from pdserve.kernels.triton.launch import Launch

_NUM_MULTIPROCESSORS = 132
_aten = torch.ops.aten


class HostWaits(AssertionError):
    """The host waits for the device, or passes host memory to it."""


class FakeGpuDevice(HostDevice):
    """Its tensors are on the fake GPU."""

    torch_device = torch.device("cuda", 0)
    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []  # names of kernels
        self.is_starting = False  # the host may wait until what it copies is on the device

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()


class _FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sits above torch's own fake mode: determines the host part of an operation, and executes it for
    real."""

    def __init__(self, device: FakeGpuDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._pinned: list[torch.UntypedStorage] = []

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        with unset_fake_temporarily():
            there = tensor.clone()
        self._pinned.append(there.untyped_storage())
        return there

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim()]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        is_for_gpu = bool(there) or (target is not None and target.type == "cuda")
        if is_for_gpu and _is_composite(func):
            with self:  # in inference mode these come whole; what they are made of is what matters
                return func.decompose(*args, **kwargs)
        if func is _aten.copy_.default and there:
            return self._copy(*args, **kwargs)
        if func is _aten._to_copy.default and target is not None and is_for_gpu:
            return self._to(args[0], target, **kwargs)
        if there and here:
            raise HostWaits(f"{func} of tensors on the host and on the device")
        if not is_for_gpu:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaits(f"{func} needs what is in its tensors") from error

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(to, FakeTensor) and isinstance(source, FakeTensor):
            return _aten.copy_.default(to, source, non_blocking)  # type: ignore[no-any-return]
        if to.shape != source.shape:
            raise RuntimeError(f"copy_: {tuple(source.shape)} to {tuple(to.shape)}")
        self._check_copy("copy_", source if isinstance(to, FakeTensor) else to, non_blocking)
        return to

    def _to(
        self, tensor: torch.Tensor, target: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) and target.type == "cuda":
            return _aten._to_copy.default(tensor, non_blocking=non_blocking, **kwargs)  # type: ignore[no-any-return]
        if isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():  # torch takes pinned memory for it
                out = self.pin(torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype))
            self._check_copy("to", out, non_blocking)
            return out
        if not self._device.is_starting:
            self._check_copy("to", tensor, non_blocking)
        return torch.empty(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype, device=target)

    def _check_copy(self, operation: str, on_host: torch.Tensor, non_blocking: bool) -> None:
        if not non_blocking:
            raise HostWaits(f"{operation} between the host and the device, without non_blocking")
        if not any(on_host.untyped_storage().data_ptr() == storage.data_ptr() for storage in self._pinned):
            raise HostWaits(f"{operation} between the device and memory that is not pinned")


def _is_composite(func: Any) -> bool:
    return bool(
        func.namespace == "aten" and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    )


@contextmanager
def fake_gpu() -> Iterator[FakeGpuDevice]:
    """A GPU of compute capability 9.0, without contents. Kernels check their tensors' device and do nothing
    else."""
    device = FakeGpuDevice()
    mode = _FakeGpu(device)

    def check_launch(launch: Launch) -> None:
        for name, argument in launch.arguments.items():
            if isinstance(argument, torch.Tensor) and argument.device.type != "cuda":
                raise HostWaits(f"{launch.kernel}: {name} is on {argument.device}")
        device.launched.append(launch.kernel.__name__)

    patches: list[AbstractContextManager[Any]] = [
        patch.object(Launch, "run", check_launch),
        patch.object(torch.Tensor, "pin_memory", lambda self: mode.pin(self)),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # These would look for the driver before they come to the dispatcher.
        patch.object(torch.Tensor, "copy_", _copy),
        patch.object(torch.Tensor, "__getitem__", _get(torch.Tensor.__getitem__)),
        patch.object(torch.Tensor, "__setitem__", _set(torch.Tensor.__setitem__)),
        *(patch.object(torch.Tensor, name, _read(getattr(torch.Tensor, name))) for name in _READING),
        *(
            patch.object(module, "num_multiprocessors", lambda device: _NUM_MULTIPROCESSORS)
            for module in _USERS
        ),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mode)
        yield device


_READING = ("nonzero", "__int__", "__float__", "__bool__", "__index__")
_USERS = (paged_attention, decode_graphs)  # users of the number of multiprocessors


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _aten.copy_.default(self, source, non_blocking)  # type: ignore[no-any-return]


def _get(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def get(self: torch.Tensor, index: Any) -> torch.Tensor:
        return _index(self, index) if isinstance(self, FakeTensor) else real(self, index)

    return get


def _read(real: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, FakeTensor):
            raise HostWaits(f"{real.__name__} needs what is in a tensor on the device")
        return real(self, *args, **kwargs)

    return read


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
    items = list(index) if isinstance(index, tuple) else [index]
    for place in [place for place, item in enumerate(items) if item is Ellipsis]:
        num_others = sum(item is not None for item in items) - 1
        items[place : place + 1] = [slice(None)] * (tensor.dim() - num_others)
    for item in items:
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
