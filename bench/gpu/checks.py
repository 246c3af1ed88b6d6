"""Runs comparisons one after the other, each by itself: seeded by its name, and its failure is one
finding."""

import math
import traceback
import zlib
from collections.abc import Iterable

import torch

from . import interpreter
from .cases import Case
from .report import Begun, Check, NotRun
from .sections import Context, GpuLostError

_SECONDS_OF_A_CHECK = 5.0  # with compiling, generously


def run_checks(context: Context, cases: Iterable[Case]) -> None:
    """Runs the requested checks from `context.first_check` on. Raises GpuLostError after one that leaves its
    process no GPU."""
    interpreter.patch_language_once()
    wanted = (case for case in cases if context.only_check in case.name)
    for number, case in enumerate(wanted):
        if number < context.first_check:
            continue
        if context.left_s < _SECONDS_OF_A_CHECK:
            context.emit(Check(case.name, math.nan, case.tolerance, "there was no time left for it"))
            continue
        context.emit(Begun(case.name))
        outcome = checked(case)
        context.emit(outcome)
        if isinstance(outcome, Check) and outcome.problem and not context.interpret and _is_gpu_lost():
            raise GpuLostError


def checked(case: Case) -> Check | NotRun:
    torch.manual_seed(zlib.crc32(case.name.encode()))
    try:
        return Check(case.name, case.error(), case.tolerance)
    except Exception as error:  # one kernel's failure, of whatever kind, is one finding
        traceback.print_exc()
        if interpreter.is_to_blame(error):
            return NotRun(case.name, interpreter.why())
        return Check(case.name, math.nan, case.tolerance, f"{type(error).__name__}: {error}")


def _is_gpu_lost() -> bool:
    """Whether the GPU is lost: after an error on it, every call of its process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
