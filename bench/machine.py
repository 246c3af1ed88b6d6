"""The machine that a figure belongs to."""

import os
import platform
from pathlib import Path

import torch

from pdserve.kernels.levels import usable_levels


def describe() -> str:
    """Returns the processor's model name, the cores that this process may use, and the kinds of kernel that
    run here: a benchmark prints it first."""
    kinds = ", ".join(usable_levels(torch.bfloat16))
    return f"{_model_name()}, {len(os.sched_getaffinity(0))} cores, {kinds}; torch {torch.__version__}"


def _model_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
