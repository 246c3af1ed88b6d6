"""A comparison, and how near it must come."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# The relative tolerance of a row: a few roundings of the dtype. float32 products are exact ones, not tf32.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """`error` compares a kernel with its reference, once."""

    name: str
    tolerance: float
    error: Callable[[], float]
