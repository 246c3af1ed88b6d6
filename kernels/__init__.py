"""The foundation of the engine: every operation of the model, over one paged KV cache, chosen once for the
device."""

from .interface import AttentionBatch, KernelRequirements, Kernels, PackedLinear, token_range_bytes
from .load import load_kernels

__all__ = [
    "AttentionBatch",
    "KernelRequirements",
    "Kernels",
    "PackedLinear",
    "load_kernels",
    "token_range_bytes",
]
