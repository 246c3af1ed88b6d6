"""Chooses the kernel implementation, once, when a worker starts."""

import logging

import torch

from .interface import KernelRequirements, Kernels
from .levels import LEVELS, UnavailableError, load_level
from .native import NativeKernels
from .reference import TorchKernels

_logger = logging.getLogger(__name__)

_CHOICES = {"cpu": ("auto", "native", *LEVELS, "torch"), "cuda": ("auto", "triton")}


def load_kernels(
    device: str,
    requirements: KernelRequirements,
    choice: str,
    num_threads: int,
) -> Kernels:
    """Returns the kernels for `device`, "cpu" or "cuda"; a `choice` other than "auto" is binding.

    Raises ValueError for an unknown device, choice or thread count, and where the chosen kernels cannot run.
    """
    if device not in _CHOICES:
        raise ValueError(f"device: {device!r} has no kernels, expected 'cpu' or 'cuda'")
    if choice not in _CHOICES[device]:
        expected = ", ".join(map(repr, _CHOICES[device]))
        raise ValueError(f"kernels: {choice!r} is not a choice for {device!r}, expected one of {expected}")
    if num_threads < 1:
        raise ValueError(f"num_threads: {num_threads} is not valid, expected at least 1")
    kernels: Kernels
    reason = "configured"
    if device == "cuda":
        kernels = _triton_kernels(requirements)
    elif choice == "torch":
        kernels = TorchKernels()
    else:
        try:
            level = "native" if choice == "auto" else choice
            kernels, reason = NativeKernels(requirements, load_level(requirements, level)), "the fastest here"
        except UnavailableError as error:
            if choice != "auto":
                raise ValueError(f"kernels: {choice!r} cannot run here: {error}") from error
            kernels, reason = TorchKernels(), str(error)
    kernels.set_num_threads(num_threads)
    _logger.info("kernels: %s (%s), %d threads", kernels.name, reason, num_threads)
    return kernels


def _triton_kernels(requirements: KernelRequirements) -> Kernels:
    try:
        from .triton.kernels import TritonKernels  # a package that only torch's CUDA builds include
    except ModuleNotFoundError as error:
        raise ValueError(f"kernels: 'triton' cannot run here: {error}") from error
    if not torch.cuda.is_available():
        raise ValueError("device: 'cuda' cannot be used here: torch finds no GPU")
    kernels = TritonKernels(requirements)
    try:
        _build_launcher()
    except Exception as error:
        raise ValueError(f"kernels: 'triton' needs a C compiler and Python's headers: {error}") from error
    return kernels


def _build_launcher() -> None:
    """Checks for the compiler with which Triton builds launchers; better now than after a worker has loaded
    its weights."""
    from triton.runtime import driver

    _ = driver.active.utils
