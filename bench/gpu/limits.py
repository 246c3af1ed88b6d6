"""The GPU's peak rates: a large copy and a large matrix product. Inputs are random, as a product of zeros
runs faster."""

import torch

from .report import Limit, Note
from .sections import Context
from .timing import median_s

COPY, PRODUCT = "copy", "product"
_COPY_BYTES = 4 << 30
_SIDE = 8192


def measure(context: Context) -> None:
    properties = torch.cuda.get_device_properties(0)
    size = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    context.emit(Note(f"{properties.name}, {size}, CUDA {torch.version.cuda}"))
    per_s = _copied_per_s()
    context.emit(
        Limit(COPY, per_s, f"{per_s / 1e12:.2f} TB/s, device to device, bytes read and bytes written")
    )
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    per_s = 2.0 * _SIDE**3 / median_s(lambda: a @ b, inner=10)
    context.emit(
        Limit(PRODUCT, per_s, f"{per_s / 1e12:.0f} TFLOP/s, bfloat16 product of {_SIDE} x {_SIDE} matrices")
    )


def _copied_per_s() -> float:
    source = torch.randint(-(2**31), 2**31 - 1, (_COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / median_s(lambda: target.copy_(source), inner=2)
