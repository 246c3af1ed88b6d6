"""Gates and ups are combined as in the torch reference, whatever their number."""

import pytest
import torch

from pdserve.kernels.reference import silu_mul as reference
from pdserve.kernels.triton.activation import silu_mul

from .support import DEVICE, assert_close_in_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (3, 136), (2, 1024), (2, 2500)])
def test_silu_mul(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    gate_up = (torch.randn(num_tokens, 2 * width) * 3).to(dtype)
    out = silu_mul(gate_up.to(DEVICE))
    assert out.shape == (num_tokens, width) and out.dtype == dtype
    assert_close_in_dtype(out, reference(gate_up.double()))


def test_gates_far_from_zero_close_and_open_fully() -> None:
    gate_up = torch.tensor([[-80.0, 0.0, 200.0, 5.0, 5.0, 5.0]], device=DEVICE)
    assert silu_mul(gate_up)[0].tolist() == pytest.approx([0.0, 0.0, 1000.0])


def test_a_batch_without_tokens_has_no_activations() -> None:
    assert silu_mul(torch.zeros(0, 16, device=DEVICE)).shape == (0, 8)


def test_rows_that_are_not_gates_and_ups_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_up:"):
        silu_mul(torch.zeros(2, 7, device=DEVICE))
    with pytest.raises(ValueError, match="gate_up:"):
        silu_mul(torch.zeros(2, 16, device=DEVICE)[:, ::2])
