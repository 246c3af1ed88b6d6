"""The gate of a gated MLP, on the packed outputs of its first linear."""

import torch
import triton
import triton.language as tl

from .launch import Launch, cdiv, power_of_two

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference.silu_mul`: gate_up [T, 2 I], gates before ups -> silu(gate) * up [T, I], rounded once."""
    num_tokens, width = gate_up.shape
    if width % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up: {width} wide, expected contiguous rows of as many gates as ups")
    out = torch.empty((num_tokens, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        silu_mul_launch(gate_up, out).run()
    return out


def silu_mul_launch(gate_up: torch.Tensor, out: torch.Tensor) -> Launch:
    num_tokens, width = out.shape
    block = min(power_of_two(width), _BLOCK)
    arguments = {"gate_up": gate_up, "out": out, "WIDTH": width, "BLOCK": block}
    return Launch(_gate_block, (num_tokens, cdiv(width, block)), arguments, num_warps=4, num_stages=1)


@triton.jit
def _gate_block(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    gate = tl.load(gate_up + token * 2 * WIDTH + columns, mask=in_row, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * WIDTH + WIDTH + columns, mask=in_row, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out + token * WIDTH + columns, gated.to(out.dtype.element_ty), mask=in_row)
