"""Applies a grammar's masks to rows of logits, in the host's format: a bit for each token."""

import torch
import triton
import triton.language as tl

from ..sampling import check_logits
from .launch import Launch, cdiv, power_of_two

_BLOCK = 2048


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Masks logits in place: in row `rows[m]` of float32 logits [R, V], token t becomes -inf unless bit t % 8
    of `bits[m, t // 8]` is set.

    rows int32 [M], each once; bits uint8 [M, ceil(V / 8)].
    """
    check_logits(logits)
    expected = (len(rows), cdiv(logits.shape[1], 8))
    if rows.dtype != torch.int32 or rows.dim() != 1:
        raise ValueError(f"rows: {rows.dtype} {tuple(rows.shape)} given, expected int32 [M]")
    if bits.dtype != torch.uint8 or bits.shape != expected or not bits.is_contiguous():
        raise ValueError(
            f"bits: {bits.dtype} {tuple(bits.shape)} given, expected contiguous uint8 {expected}"
        )
    if len(rows):
        mask_launch(logits, rows, bits).run()


def mask_launch(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> Launch:
    vocab_size = logits.shape[1]
    block = min(power_of_two(vocab_size), _BLOCK)
    arguments = {"logits": logits, "rows": rows, "bits": bits, "VOCAB_SIZE": vocab_size, "BLOCK": block}
    return Launch(_forbid_block, (len(rows), cdiv(vocab_size, block)), arguments, num_warps=4, num_stages=1)


@triton.jit
def _forbid_block(
    logits: tl.tensor, rows: tl.tensor, bits: tl.tensor, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = tokens < VOCAB_SIZE
    allowed = tl.load(bits + m * ((VOCAB_SIZE + 7) // 8) + tokens // 8, mask=in_row, other=0).to(tl.int32)
    forbidden = in_row & (((allowed >> (tokens % 8)) & 1) == 0)
    row = tl.load(rows + m).to(tl.int64)
    tl.store(logits + row * VOCAB_SIZE + tokens, -float("inf"), mask=forbidden)
