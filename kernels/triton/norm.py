"""The norms of the residual stream. A program has a whole row: a token's result never depends on its
batch."""

import torch
import triton
import triton.language as tl

from .launch import Launch, power_of_two

_MAX_WARPS = 16
_ELEMENTS_PER_THREAD = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Kernels.rms_norm`: x [T, H], weight [H] -> [T, H]."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Kernels.add_rms_norm`: residual [T, H] += x [T, H] in place; the norm is that of the sum as it is
    stored."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual: {residual.dtype} {tuple(residual.shape)} given, expected x's {x.dtype}"
            f" {tuple(x.shape)}"
        )
    return _norm(x, residual, weight, eps)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if not x.is_contiguous():
        raise ValueError("x: strided rows given, expected contiguous ones")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: shape {tuple(weight.shape)} given, expected {tuple(x.shape[-1:])}")
    out = torch.empty_like(x)
    if x.numel():
        norm_launch(x, residual, weight, eps, out).run()
    return out


def norm_launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> Launch:
    num_tokens, width = x.shape
    block = power_of_two(width)
    arguments = {
        "x": x,
        "residual": x if residual is None else residual,
        "weight": weight,
        "out": out,
        "eps": eps,
        "WIDTH": width,
        "BLOCK": block,
        "ADDS": residual is not None,
    }
    num_warps = min(max(block // (32 * _ELEMENTS_PER_THREAD), 1), _MAX_WARPS)
    return Launch(_normalise_row, (num_tokens,), arguments, num_warps, num_stages=1)


@triton.jit
def _normalise_row(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    offsets = tl.program_id(0).to(tl.int64) * WIDTH + columns
    row = tl.load(x + offsets, mask=in_row, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(residual + offsets, mask=in_row, other=0.0).to(tl.float32)
        stored = row.to(residual.dtype.element_ty)
        tl.store(residual + offsets, stored, mask=in_row)
        row = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out + offsets, (row * scale * weights).to(out.dtype.element_ty), mask=in_row)
