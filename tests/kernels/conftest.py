"""Kernels under test, and random paged batches to run them on."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pdserve.kernels import AttentionBatch, KernelRequirements, Kernels, build, load_kernels
from pdserve.kernels.levels import LEVELS, LevelLibrary, usable_levels
from pdserve.kernels.native import NativeKernels
from pdserve.kernels.triton.kernels import TritonKernels

MakeKernels = Callable[..., Kernels]

TILE_MODEL = "amx in software"
NATIVE = [*LEVELS, TILE_MODEL]


class Subject(NamedTuple):
    """Kernels, and the device that their tensors are on."""

    kernels: Kernels
    device: str

    def there(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.device) for tensor in tensors]


def make_subject(name: str, dtype: torch.dtype, num_threads: int = 1) -> Subject:
    """Returns the kernels of that name, Triton's in its interpreter where there is no GPU; skips the test
    where this machine has none."""
    requirements = KernelRequirements(dtype, head_dim=64, block_size=16)
    if name == "triton":
        return Subject(TritonKernels(requirements), "cuda" if torch.cuda.is_available() else "cpu")
    if name == TILE_MODEL:
        return Subject(_tile_model(requirements, num_threads), "cpu")
    if name in LEVELS and name not in usable_levels(dtype):
        pytest.skip(f"{name} kernels do not compute {dtype} on this machine")
    return Subject(load_kernels("cpu", requirements, name, num_threads), "cpu")


def _tile_model(requirements: KernelRequirements, num_threads: int) -> Kernels:
    if requirements.dtype != torch.bfloat16 or "avx512_bf16" not in usable_levels(torch.bfloat16):
        pytest.skip("the tiles' model computes bfloat16, beside AVX-512 with bf16")
    kernels = NativeKernels(requirements, LevelLibrary.open("amx", _tile_model_library()))
    kernels.set_num_threads(num_threads)
    return kernels


@cache
def _tile_model_library() -> Path:
    """The kernels for AMX with the tiles in software, compiled once a session."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("the tiles' model is compiled here, and there is no g++")
    folder = Path(tempfile.mkdtemp(prefix="pdserve-tiles-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build.compile_library([compiler], "objcopy", {"amx": build.TILE_MODEL}, folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> MakeKernels:
    """Returns native(dtype, num_threads=1): the native kernels of one level after the other; skips the test
    where this machine does not run it."""

    return lambda dtype, num_threads=1: make_subject(request.param, dtype, num_threads).kernels


def halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys and the values of a layer's cache."""
    keys, values = cache
    return keys, values


def paged_batch(
    query_lens: list[int], context_lens: list[int], block_size: int
) -> tuple[AttentionBatch, int]:
    """Builds sequences over shuffled blocks; returns the batch and how many blocks its cache must have."""
    counts = [-(-length // block_size) for length in context_lens]
    free = torch.randperm(sum(counts) + 2).tolist()
    tables = torch.full((len(counts), max(counts)), 10**6, dtype=torch.int32)
    slots = []
    for s, (query_len, context_len, count) in enumerate(zip(query_lens, context_lens, counts, strict=True)):
        tables[s, :count] = torch.tensor([free.pop() for _ in range(count)])
        positions = torch.arange(context_len - query_len, context_len)
        slots.append(tables[s, positions // block_size].long() * block_size + positions % block_size)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return AttentionBatch(
        starts, torch.tensor(context_lens, dtype=torch.int32), tables, torch.cat(slots)
    ), sum(counts) + 2


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Compares `actual` in its dtype with the float64 result: errors are in units of that dtype's
    precision."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1e-2}[actual.dtype]
    error = (actual.cpu().double() - exact).abs().max().item()
    assert error <= tolerance * max(1.0, exact.abs().max().item()), error
