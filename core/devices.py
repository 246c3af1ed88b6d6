"""The kinds of device that an instance computes on, and the settings that each implies."""

from collections.abc import Mapping
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

KernelChoice = Literal[
    "auto", "native", "amx", "avx512_bf16", "avx512", "avx2", "portable", "torch", "triton"
]

# The names that `kernels.load` uses, for callers that do not import torch.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("auto", "native", "amx", "avx512_bf16", "avx512", "avx2", "portable", "torch"),
    "cuda": ("auto", "triton"),
}
GPU_LINKS = ("cuda_ipc", "nccl")  # values of `kv.transport`
