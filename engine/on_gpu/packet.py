"""Moves arrays whose number and sizes vary from step to step to the device: one piece of memory, one copy."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..device import Device

Array = npt.NDArray[Any]

_ALIGNMENT = 16  # bytes; with another pointer alignment Triton would recompile its kernels
_DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def spans(sizes: Iterable[int]) -> list[slice]:
    """Returns where arrays of so many bytes lie in one piece of memory, which ends with the last of them."""
    found, end = [], 0
    for num_bytes in sizes:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + num_bytes
        found.append(slice(start, end))
    return found


def send(device: Device, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Returns the arrays on the device, by name; the copy is queued without a wait.

    Each call takes separate pinned memory: torch reuses it only when the copy from it is done, so that any
    number of steps may be under way."""
    if not arrays:
        return {}
    places = dict(zip(arrays, spans(array.nbytes for array in arrays.values()), strict=True))
    packet = np.zeros(max(place.stop for place in places.values()), dtype=np.uint8)
    for name, array in arrays.items():
        packet[places[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = device.pinned(torch.from_numpy(packet)).to(device.torch_device, non_blocking=True)
    return {
        name: there[places[name]].view(_DTYPES[array.dtype]).view(array.shape)
        for name, array in arrays.items()
    }
