"""Kernels are chosen once, the choice is logged, and a choice that cannot be met is an error."""

import ctypes
import logging
import sys
from types import SimpleNamespace
from typing import Literal, get_args

import pytest
import torch

from pdserve.core.devices import KERNELS, KernelChoice
from pdserve.kernels import KernelRequirements, levels, load, load_kernels
from pdserve.kernels.levels import LEVELS, usable_levels

from .conftest import MakeKernels, assert_close

REQUIREMENTS = KernelRequirements(torch.float32, head_dim=64, block_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_fastest_level_left_as_each_is_switched_off(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = KernelRequirements(dtype, head_dim=64, block_size=16)
    off: set[str] = set()
    runs_here = levels._runs_here
    monkeypatch.setattr(levels, "_runs_here", lambda level: level not in off and runs_here(level))
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(40, 64).to(dtype)
    for level in usable_levels(dtype):
        kernels = load_kernels("cpu", requirements, "auto", 1)
        assert kernels.name == level
        assert_close(kernels.linear(x, kernels.pack_linear(weight)), x.double() @ weight.double().T)
        off.add(level)
        if level != "portable":
            with pytest.raises(
                ValueError, match=f"kernels: '{level}' cannot run here: {dtype} has .*portable"
            ):
                load_kernels("cpu", requirements, level, 1)


def test_a_level_without_float32_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"'avx512_bf16' cannot run here: torch\.float32 has .*portable"):
        load_kernels("cpu", REQUIREMENTS, "avx512_bf16", 1)


def test_refused_tile_registers_are_logged_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = SimpleNamespace(pd_cpu_has=lambda level: 1, pd_request_tiles=lambda: -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: refusing)
    assert not levels._runs_here.__wrapped__("amx")
    assert "refuses its tile registers" in caplog.text


@pytest.mark.parametrize(
    "requirements", [KernelRequirements(torch.float16, 64, 16), KernelRequirements(torch.float32, 264, 16)]
)
def test_auto_takes_torch_where_native_is_unavailable_and_logs_why(
    requirements: KernelRequirements, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert load_kernels("cpu", requirements, "auto", 1).name == "torch"
    assert "torch (" in caplog.text
    with pytest.raises(ValueError, match="'native' cannot run here"):
        load_kernels("cpu", requirements, "native", 1)


def test_a_missing_library_is_an_error_when_native_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "LIBRARY_PATH", levels.LIBRARY_PATH.with_name("absent.so"))
    assert load_kernels("cpu", REQUIREMENTS, "auto", 1).name == "torch"
    with pytest.raises(ValueError, match="was not built"):
        load_kernels("cpu", REQUIREMENTS, "native", 1)


@pytest.mark.parametrize(
    ("device", "choice", "num_threads", "complaint"),
    [
        ("tpu", "auto", 1, "device"),
        ("cpu", "fast", 1, "kernels"),
        ("cpu", "triton", 1, "kernels: 'triton' is not a choice for 'cpu'"),
        ("cuda", "native", 1, "kernels: 'native' is not a choice for 'cuda'"),
        ("cuda", "torch", 1, "kernels"),
        ("cpu", "auto", 0, "num_threads"),
    ],
)
def test_bad_choices_are_refused(device: str, choice: str, num_threads: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_kernels(device, REQUIREMENTS, choice, num_threads)


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_cuda_takes_tritons_kernels(
    choice: Literal["auto", "triton"], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_gpu(monkeypatch, (9, 0))
    assert load_kernels("cuda", REQUIREMENTS, choice, 1).name == "triton"


@pytest.mark.parametrize(
    ("requirements", "capability", "complaint"),
    [
        (KernelRequirements(torch.bfloat16, 264, 16), (9, 0), "head_dim 264"),
        (KernelRequirements(torch.float32, 136, 16), (9, 0), "head_dim 136"),
        (KernelRequirements(torch.bfloat16, 8, 16), (9, 0), "head_dim 8"),
        (REQUIREMENTS, (7, 5), "capability 7.5 is below 8.0"),
    ],
)
def test_requirements_beyond_tritons_kernels_are_refused(
    requirements: KernelRequirements,
    capability: tuple[int, int],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _pretend_gpu(monkeypatch, capability)
    with pytest.raises(ValueError, match=f"'triton' cannot run here: .*{complaint}"):
        load_kernels("cuda", requirements, "auto", 1)


def test_cuda_is_refused_where_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    _pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(load, "_build_launcher", fail)
    with pytest.raises(
        ValueError, match="'triton' needs a C compiler and Python's headers: Failed to find C compiler"
    ):
        load_kernels("cuda", REQUIREMENTS, "auto", 1)


def test_cuda_is_refused_without_a_gpu_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
        load_kernels("cuda", REQUIREMENTS, "auto", 1)
    monkeypatch.setitem(sys.modules, "pdserve.kernels.triton.kernels", None)
    with pytest.raises(ValueError, match="'triton' cannot run here"):
        load_kernels("cuda", REQUIREMENTS, "auto", 1)


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(load, "_build_launcher", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((torch.float64, 64, 16), "dtype"),
        ((torch.float32, 12, 16), "head_dim"),
        ((torch.float32, 64, 0), "block_size"),
    ],
)
def test_impossible_requirements_are_refused(arguments: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        KernelRequirements(*arguments)


def test_native_operations_refuse_arguments_they_would_misread(native: MakeKernels) -> None:
    kernels = native(torch.bfloat16)
    packed = kernels.pack_linear(torch.randn(32, 64).bfloat16())
    for x in (torch.randn(2, 64), torch.randn(64, 2).bfloat16().T, torch.randn(2, 62).bfloat16()):
        with pytest.raises(ValueError, match="x:"):
            kernels.linear(x, packed)
    with pytest.raises(ValueError, match="weight:"):
        kernels.pack_linear(torch.randn(32, 63).bfloat16())
    with pytest.raises(ValueError, match="out_dtype:"):
        kernels.linear(torch.randn(2, 64).bfloat16(), packed, torch.float16)


def test_the_choices_a_configuration_accepts_are_those_that_exist() -> None:
    assert load._CHOICES == KERNELS
    choices = {choice for of_device in KERNELS.values() for choice in of_device}
    assert choices == set(get_args(KernelChoice)) == {"auto", "native", *LEVELS, "torch", "triton"}
