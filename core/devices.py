"""The kinds of device that an instance computes on, and the settings that each implies."""

from collections.abc import Mapping
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

# The names that `kernels.load` uses, for callers that do not import torch.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("auto", "native", "torch"),
    "cuda": ("auto", "triton"),
}
GPU_LINKS = ("cuda_ipc", "nccl")  # values of `kv.transport`
