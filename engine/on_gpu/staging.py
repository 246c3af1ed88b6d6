"""Moves a step's numbers from the host to the device: packed into one piece of pinned memory, one copy a
step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from ..device import Device, DeviceEvent
from .packet import spans

_NUM_BUFFERS = 2  # the host fills one while the device may still copy from the other

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Field:
    """One array of the packet."""

    name: str
    dtype: torch.dtype
    length: int


class Staging:
    """Arrays that stay on the device and are overwritten from the host step by step, all at once."""

    def __init__(self, device: Device, fields: Sequence[Field]) -> None:
        places = spans(field.length * field.dtype.itemsize for field in fields)
        placed = list(zip(fields, places, strict=True))
        end = places[-1].stop
        self._device = device
        self._there = torch.zeros(end, dtype=torch.uint8, device=device.torch_device)
        self.on_device = _views(self._there, placed)  # by name
        buffers = [device.pinned(torch.zeros(end, dtype=torch.uint8)) for _ in range(_NUM_BUFFERS)]
        self._buffers: list[tuple[torch.Tensor, dict[str, Array], DeviceEvent]] = [
            (buffer, {name: view.numpy() for name, view in _views(buffer, placed).items()}, device.event())
            for buffer in buffers
        ]
        self._next = 0

    def fill(self) -> dict[str, Array]:
        """Returns the host's arrays, by name, to be written before `send`. Waits while the device still
        copies from them."""
        _, arrays, copied = self._buffers[self._next]
        copied.synchronize()
        return arrays

    def send(self) -> None:
        """Queues the copy; work queued later on the device sees the new numbers, work queued before saw the
        old ones."""
        buffer, _, copied = self._buffers[self._next]
        self._there.copy_(buffer, non_blocking=True)
        copied.record()
        self._next = (self._next + 1) % _NUM_BUFFERS


def _views(memory: torch.Tensor, placed: list[tuple[Field, slice]]) -> dict[str, torch.Tensor]:
    return {field.name: memory[span].view(field.dtype) for field, span in placed}
