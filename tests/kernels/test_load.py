"""Kernels are chosen once, aloud, and a choice that cannot be met is an error."""

import logging

import pytest
import torch

from pdserve.kernels import KernelRequirements, load_kernels, native

from .conftest import MakeKernels

REQUIREMENTS = KernelRequirements(torch.float32, head_dim=64, block_size=16)


def test_auto_takes_the_native_kernels_where_they_run(native: MakeKernels) -> None:
    native(torch.float32)
    assert load_kernels("cpu", REQUIREMENTS, "auto", 1).name == "native"


@pytest.mark.parametrize(
    "requirements", [KernelRequirements(torch.float16, 64, 16), KernelRequirements(torch.float32, 264, 16)]
)
def test_auto_takes_torch_where_native_cannot_serve_and_says_why(
    requirements: KernelRequirements, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert load_kernels("cpu", requirements, "auto", 1).name == "torch"
    assert "torch (" in caplog.text
    with pytest.raises(ValueError, match="'native' cannot run here"):
        load_kernels("cpu", requirements, "native", 1)


def test_a_missing_library_is_an_error_when_native_is_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(native, "LIBRARY_PATH", native.LIBRARY_PATH.with_name("absent.so"))
    assert load_kernels("cpu", REQUIREMENTS, "auto", 1).name == "torch"
    with pytest.raises(ValueError, match="was not built"):
        load_kernels("cpu", REQUIREMENTS, "native", 1)


@pytest.mark.parametrize(
    ("device", "choice", "num_threads", "complaint"),
    [("tpu", "auto", 1, "device"), ("cpu", "fast", 1, "kernels"), ("cpu", "auto", 0, "num_threads")],
)
def test_bad_choices_are_refused(device: str, choice: str, num_threads: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_kernels(device, REQUIREMENTS, choice, num_threads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((torch.float64, 64, 16), "dtype"), ((torch.float32, 12, 16), "head_dim"), ((torch.float32, 64, 0), "block_size")],
)
def test_impossible_requirements_are_refused(arguments: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        KernelRequirements(*arguments)


def test_native_operations_refuse_what_they_would_misread(native: MakeKernels) -> None:
    kernels = native(torch.bfloat16)
    packed = kernels.pack_linear(torch.randn(32, 64).bfloat16())
    for x in (torch.randn(2, 64), torch.randn(64, 2).bfloat16().T, torch.randn(2, 62).bfloat16()):
        with pytest.raises(ValueError, match="x:"):
            kernels.linear(x, packed)
    with pytest.raises(ValueError, match="weight:"):
        kernels.pack_linear(torch.randn(32, 63).bfloat16())
    with pytest.raises(ValueError, match="out_dtype:"):
        kernels.linear(torch.randn(2, 64).bfloat16(), packed, torch.float16)
