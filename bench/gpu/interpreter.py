"""Triton's interpreter: made faster, and whether it works with this machine's numpy.

Triton 3.6's does not with numpy 2.4 and later, which no longer convert an array of one element to a number,
and a loop to a bound that was loaded from memory needs that."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from pdserve.kernels.triton.launch import INTERPRETED


@triton.jit  # type: ignore[untyped-decorator]
def _count(out: tl.tensor, end: tl.tensor) -> None:
    for number in range(tl.load(end)):
        tl.store(out + number, 1)


@cache
def patch_language_once() -> None:
    """Makes the interpreter replace the language's functions once for each module. By itself it does so again
    in every call of a device function, which takes up to half of its time. They stay replaced: a process that
    interprets compiles nothing."""
    patch: Callable[[Any], object] = interpreter._patch_lang
    patched = SimpleNamespace(restore=lambda: None)
    modules: set[str] = set()

    def patch_once(function: Any) -> SimpleNamespace:
        if function.__module__ not in modules:
            modules.add(function.__module__)
            patch(function)
        return patched

    if INTERPRETED:
        interpreter._patch_lang = patch_once


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
