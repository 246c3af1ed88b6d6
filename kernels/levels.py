"""The levels of instruction set that the native library is compiled for, and which of them may run here.

A level is a kind of kernel: within one, equal inputs give equal bits; two differ as rounding does."""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import torch

from .build import LIBRARY_NAME
from .interface import KernelRequirements

LIBRARY_PATH = Path(__file__).resolve().parent / LIBRARY_NAME

LEVELS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")  # the fastest first
_BFLOAT16_ALONE = ("amx", "avx512_bf16")  # their float32 would be avx512's
_MAX_HEAD_DIM = 256

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "pack_linear": [_P, _P, _N, _N, _P],
    "linear": [_I, _I, _I, _P, _P, _P, _P, _N, _N, _N],
    "rms_norm": [_I, _P, _P, _P, _P, _N, _N, _F],
    "rope_and_cache": [_I, _P, _P, _P, _P, _P, _F, _P, _P, _P, _P, _N, _N, _N, _N, _N],
    "paged_attention": [_I, _P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _N, _F],
    "argmax": [_P, _P, _N, _N],
    "gather_tokens": [_P, _P, _N, _N, _N, _N, _N, _N, _P, _N, _N],
    "wire_checksum": [_P, _N],
    "scatter_tokens": [_P, _P, _N, _N, _N, _N, _N, _N, _P, _N, _N],
    "copy_blocks": [_P, _N, _N, _N, _P, _N],
}
_RESULTS = {"gather_tokens": ctypes.c_uint64, "wire_checksum": ctypes.c_uint64}

_logger = logging.getLogger(__name__)


class UnavailableError(ValueError):
    """No native kernels, or not those of a level, can serve the requirements on this machine."""


@dataclass(frozen=True)
class LevelLibrary:
    """One level's functions of the library, by their names without prefix."""

    level: str
    functions: SimpleNamespace

    @classmethod
    def open(cls, level: str, path: Path) -> Self:
        library = ctypes.CDLL(str(path))
        functions = SimpleNamespace(set_num_threads=library.pd_set_num_threads)
        functions.set_num_threads.argtypes, functions.set_num_threads.restype = [_I], None
        for name, argument_types in _SIGNATURES.items():
            function = getattr(library, f"pd_{level}_{name}")
            function.argtypes, function.restype = argument_types, _RESULTS.get(name)
            setattr(functions, name, function)
        return cls(level, functions)


def load_level(requirements: KernelRequirements, choice: str) -> LevelLibrary:
    """Returns the functions of level `choice`, or of the fastest that runs here where it is "native".

    Raises UnavailableError, which names the obstacle."""
    if requirements.dtype not in (torch.float32, torch.bfloat16):
        # float16 is not worth its own kernels: CPUs multiply it by widening
        raise UnavailableError(f"{requirements.dtype} has no native kernels")
    if requirements.head_dim > _MAX_HEAD_DIM:
        raise UnavailableError(f"head_dim {requirements.head_dim} is above {_MAX_HEAD_DIM}")
    if not LIBRARY_PATH.exists():
        raise UnavailableError(f"{LIBRARY_NAME} was not built with this package")
    usable = usable_levels(requirements.dtype)
    if choice == "native":
        return LevelLibrary.open(usable[0], LIBRARY_PATH)
    if choice not in usable:
        raise UnavailableError(f"{requirements.dtype} has {', '.join(usable)} on this CPU")
    return LevelLibrary.open(choice, LIBRARY_PATH)


def usable_levels(dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the levels that compute `dtype` on this machine, the fastest first; the last runs anywhere."""
    levels = [level for level in LEVELS if dtype == torch.bfloat16 or level not in _BFLOAT16_ALONE]
    return tuple(level for level in levels if _runs_here(level))


@cache  # what the processor has does not change, and Linux is asked once
def _runs_here(level: str) -> bool:
    library = ctypes.CDLL(str(LIBRARY_PATH))
    if not library.pd_cpu_has(level.encode()):
        return False
    if level == "amx" and library.pd_request_tiles() != 0:
        _logger.warning("kernels: this CPU has AMX, but the operating system refuses its tile registers")
        return False
    return True
