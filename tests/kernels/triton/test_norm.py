"""The norms add and normalise like the torch reference, whatever the row's width."""

import pytest
import torch

from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.norm import add_rms_norm, rms_norm

from .support import DEVICE, assert_close_in_dtype

EPS = 1e-6
reference = TorchKernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width"), [(3, 64), (1, 896), (2, 5120)])
def test_add_rms_norm(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    x, residual = torch.randn(2, num_tokens, width).to(dtype)
    residual *= 3
    weight = (torch.rand(width) + 0.5).to(dtype)
    stream = residual.clone().to(DEVICE)
    out = add_rms_norm(x.to(DEVICE), stream, weight.to(DEVICE), EPS)
    assert_sum(stream.cpu(), residual, x)
    assert_close_in_dtype(out, _exact_norm(stream.cpu(), weight))
    assert_close_in_dtype(rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS), _exact_norm(x, weight))


def assert_sum(actual: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    if DEVICE == "cpu" and actual.dtype == torch.bfloat16:
        # the interpreter truncates bfloat16 where GPUs round it
        assert_close_in_dtype(actual, first.double() + second)
    else:
        assert torch.equal(actual, first + second)


def _exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gives the reference float32, so that it rounds nothing before the end."""
    return reference.rms_norm(x.float(), weight.float(), EPS).double()


def test_rows_of_zeros_and_of_large_numbers_stay_finite() -> None:
    rows = torch.stack((torch.zeros(64), torch.full((64,), 3e4))).to(torch.float16).to(DEVICE)
    out = rms_norm(rows, torch.ones(64, dtype=torch.float16, device=DEVICE), EPS)
    assert torch.equal(out.cpu(), torch.tensor([[0.0], [1.0]]).half().expand(2, 64))


def test_a_batch_without_tokens_has_an_empty_norm() -> None:
    empty, weight = torch.zeros(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert add_rms_norm(empty, empty.clone(), weight, EPS).shape == (0, 64)


def test_rows_and_weights_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    with pytest.raises(ValueError, match="residual:"):
        add_rms_norm(x, torch.zeros(2, 63, device=DEVICE), weight, EPS)
    with pytest.raises(ValueError, match="residual:"):
        add_rms_norm(x, torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE), weight, EPS)
    with pytest.raises(ValueError, match="weight:"):
        rms_norm(x, weight[:32], EPS)
    with pytest.raises(ValueError, match="x:"):
        rms_norm(x[:, ::2], weight[:32], EPS)
