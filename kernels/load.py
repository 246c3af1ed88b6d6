"""Chooses the kernel implementation, once, when a worker starts."""

import logging
from typing import Literal

from .interface import KernelRequirements, Kernels
from .native import NativeKernels, why_unavailable
from .reference import TorchKernels

_logger = logging.getLogger(__name__)


def load_kernels(
    device: str, requirements: KernelRequirements, choice: Literal["auto", "native", "torch"], num_threads: int
) -> Kernels:
    """The kernels for `device`; a `choice` other than "auto" is binding.

    Raises ValueError for an unknown device, choice or thread count, and where the chosen kernels cannot run.
    """
    if device != "cpu":
        raise ValueError(f"device: {device!r} has no kernels, expected 'cpu'")
    if choice not in ("auto", "native", "torch"):
        raise ValueError(f"kernels: {choice!r} is not a choice, expected 'auto', 'native' or 'torch'")
    if num_threads < 1:
        raise ValueError(f"num_threads: {num_threads} is not valid, expected at least 1")
    reason = "configured" if choice != "auto" else why_unavailable(requirements)
    kernels: Kernels
    if choice == "native" or (choice == "auto" and reason is None):
        kernels = NativeKernels(requirements)
    else:
        kernels = TorchKernels()
    kernels.set_num_threads(num_threads)
    _logger.info("kernels: %s (%s), %d threads", kernels.name, reason or "the fastest here", num_threads)
    return kernels
