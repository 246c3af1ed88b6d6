"""What an instance computes on, and which choices go with it."""

from collections.abc import Mapping
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

# As `kernels.load` has them, for who knows no torch.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("auto", "native", "torch"),
    "cuda": ("auto", "triton"),
}
GPU_LINKS = ("cuda_ipc", "nccl")  # of `kv.transport`
