"""A kernel launch as a value, so that the compile gate compiles exactly the launches of production,
meta-parameters included."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import torch
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret  # fixed when triton is imported, as the kernels' nature is
HOPPER = 90


class Launch(msgspec.Struct, frozen=True):
    """One kernel over a grid; `arguments` are by name, tensors, numbers and constants alike."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    # per thread; None: the assembler's choice, which may spill a few for another block
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Returns the arguments in the form that Triton's launcher takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


@lru_cache
def target_of(device: torch.device) -> int:
    """Returns the compute capability, 90 for 9.0; a device without one gets Hopper's."""
    if device.type != "cuda":
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
