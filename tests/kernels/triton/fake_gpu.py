"""A GPU that is not there: tensors that say they are on it and hold nothing, to run code that queues work on a device and see
that it never waits for it, nor mixes its tensors with the host's.

Torch's own fake tensors refuse what needs their values. Seen to here: copies that wait; indices from the host; launches of
Triton's kernels, which are looked at and left out; and the few calls that a torch without CUDA refuses for such tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdserve.engine.device import HostDevice
from pdserve.kernels.triton.launch import Launch

_GPU = torch.device("cuda", 0)
_aten = torch.ops.aten


class HostWaits(Exception):
    """The host would wait for the device."""


class DevicesMixed(Exception):
    """A tensor is not where the others are."""


class FakeGpu(HostDevice):
    """Its tensors are on "cuda"; nothing is computed, so that there is nothing to wait for."""

    torch_device = _GPU
    runs_ahead = True

    def __init__(self, launched: list[str]) -> None:
        self.launched = launched  # names of the kernels so far

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside, all tensors are fake. Raises HostWaits or DevicesMixed where the caller of a real GPU would wait, or fail.

    What is read on the host, of whichever tensor, must be read before or after.
    """
    launched: list[str] = []

    def run(launch: Launch) -> None:
        _check_on_gpu(launch.kernel.__name__, (value for value in launch.arguments.values() if isinstance(value, torch.Tensor)))
        launched.append(launch.kernel.__name__)

    hopper = SimpleNamespace(multi_processor_count=132)
    with ExitStack() as stack:
        stack.enter_context(patch.object(Launch, "run", run))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda device=None: hopper))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Watch())
        stack.enter_context(_Bindings())
        yield FakeGpu(launched)


class _Watch(TorchDispatchMode):
    """Sees every operation as the device's backend would be given it."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:  # in inference mode these come whole; what they are made of is what matters
                return func.decompose(*args, **kwargs)
        if func is _aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is _aten._pin_memory.default:
            return self._pin(_aten.clone(args[0]))
        if func is _aten._to_copy.default:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            non_blocking, to_host = kwargs.get("non_blocking", False), source.type != target.type == "cpu"
            self._check_copy(source, target, non_blocking, to_host or self._is_pinned(args[0]))
            result = func(*args, **kwargs)
            return self._pin(result) if to_host else result  # torch takes pinned memory for it
        if func is _aten.copy_.default:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self._check_copy(args[1].device, args[0].device, non_blocking, any(map(self._is_pinned, args[:2])))
        else:
            _check_same_device(str(func), tree_leaves((args, kwargs)))
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaits(f"{func} needs the values of its tensors") from error
        return self._pin(result) if kwargs.get("pin_memory") else result

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.append(tensor.untyped_storage())
        return tensor

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == storage._cdata for storage in self._pinned)

    def _check_copy(self, source: torch.device, target: torch.device, non_blocking: bool, is_pinned: bool) -> None:
        if source.type == target.type:
            return
        if not non_blocking:
            raise HostWaits(f"a copy from {source.type} to {target.type} without non_blocking")
        if not is_pinned:
            raise HostWaits(f"a copy from {source.type} to {target.type} of memory that is not pinned")


class _Bindings(TorchFunctionMode):
    """Puts operations in place of those of torch's methods that ask for a GPU's driver first."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args else None
        if not isinstance(subject, torch.Tensor) or subject.device != _GPU:
            return func(*args, **kwargs)
        if func in _READING:
            raise HostWaits(f"{func.__name__} needs the values of its tensor")
        if func is torch.Tensor.copy_:
            return _aten.copy_(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            return _get(subject, args[1])
        if func is torch.Tensor.__setitem__:
            return _set(subject, args[1], args[2])
        return func(*args, **kwargs)


_READING = (
    torch.nonzero,
    torch.argwhere,
    torch.Tensor.nonzero,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__bool__,
    torch.Tensor.__index__,
)


def _get(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    view, picks = _view(tensor, index)
    return view if picks is None else _aten.index(view, picks)


def _set(tensor: torch.Tensor, index: Any, value: Any) -> None:
    view, picks = _view(tensor, index)
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=view.dtype, device=_GPU)
    if picks is None:
        _aten.copy_(view, value)
    else:
        _aten.index_put_(view, picks, value)


def _view(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """What numbers and slices leave of it, and the tensors that pick from that, by dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        where = next(place for place, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part.dim() if _is_mask(part) else 1 for part in parts if part is not None and part is not Ellipsis)
        parts[where : where + 1] = [slice(None)] * (tensor.dim() - taken)
    picks: list[torch.Tensor | None] = []
    for part in parts:
        dim = len(picks)
        if part is None:
            tensor = tensor.unsqueeze(dim)
            picks.append(None)
        elif isinstance(part, slice):
            tensor = _aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            picks.append(None)
        elif isinstance(part, int) and not isinstance(part, bool):
            tensor = tensor.select(dim, part)
        else:
            pick = part if isinstance(part, torch.Tensor) else torch.tensor(part)
            if _is_mask(pick):
                raise HostWaits("an index by a mask needs the mask's values")
            picks.append(pick)
    return tensor, picks if any(pick is not None for pick in picks) else None


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)


def _check_same_device(operation: str, values: Iterable[Any]) -> None:
    """A number in a tensor of no dimension may be the host's, as any number."""
    types = {value.device.type for value in values if isinstance(value, torch.Tensor) and value.dim() > 0}
    if len(types) > 1:
        raise DevicesMixed(f"{operation} of tensors on {' and '.join(sorted(types))}")


def _check_on_gpu(kernel: str, tensors: Iterable[torch.Tensor]) -> None:
    if any(tensor.device != _GPU for tensor in tensors):
        raise DevicesMixed(f"{kernel} is given a tensor that is not on the GPU")
