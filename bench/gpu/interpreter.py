"""Whether Triton's interpreter works with this machine's numpy: Triton 3.6's does not with numpy 2.4 and
later, which no longer convert an array of one element to a number, and a loop to a bound that was loaded from
memory needs that."""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from pdserve.kernels.triton.launch import INTERPRETED


@triton.jit  # type: ignore[untyped-decorator]
def _count(out: tl.tensor, end: tl.tensor) -> None:
    for number in range(tl.load(end)):
        tl.store(out + number, 1)


@cache
def is_broken() -> bool:
    """Asked of a kernel that does what breaks it, not of versions."""
    if not INTERPRETED:
        return False
    out, end = torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    try:
        _count[(1,)](out, end)
    except Exception as error:
        return _has_type_error(error)
    return False


def is_to_blame(error: BaseException) -> bool:
    """Whether a check that raised this says nothing of its kernel."""
    return _has_type_error(error) and is_broken()


def why() -> str:
    return f"the interpreter of Triton {triton.__version__} does not work with numpy {np.__version__}"


def _has_type_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, TypeError):
            return True
        error = error.__cause__ or error.__context__
    return False
