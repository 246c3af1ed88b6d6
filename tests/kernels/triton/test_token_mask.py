"""A mask rules out the tokens whose bits are not set, in its row, and touches nothing else."""

import numpy as np
import pytest
import torch

from pdserve.kernels.triton.token_mask import mask_tokens

from .support import DEVICE


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 50, 2048, 5003])
def test_tokens_without_a_bit_become_impossible(vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size)
    logits[3, 0] = torch.nan
    allowed = torch.rand(2, vocab_size) < 0.4
    bits = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little"))
    expected = logits.clone()
    expected[3].masked_fill_(~allowed[0], -torch.inf)
    expected[1].masked_fill_(~allowed[1], -torch.inf)
    there = logits.to(DEVICE)
    mask_tokens(there, torch.tensor([3, 1], dtype=torch.int32).to(DEVICE), bits.to(DEVICE))
    torch.testing.assert_close(there.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_an_empty_batch_is_a_no_op() -> None:
    logits = torch.ones(2, 9, device=DEVICE)
    no_bits = torch.empty((0, 2), dtype=torch.uint8, device=DEVICE)
    mask_tokens(logits, torch.empty(0, dtype=torch.int32, device=DEVICE), no_bits)
    assert logits.min() == 1.0


def test_masks_of_another_type_or_size_are_refused() -> None:
    logits, rows = torch.zeros(2, 50, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    bits = torch.zeros(1, 7, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="logits:"):
        mask_tokens(logits.half(), rows, bits)
    with pytest.raises(ValueError, match="rows:"):
        mask_tokens(logits, rows.long(), bits)
    for other in (bits[:, :6], bits.bool(), torch.zeros(2, 7, dtype=torch.uint8, device=DEVICE)):
        with pytest.raises(ValueError, match="bits:"):
            mask_tokens(logits, rows, other)
