"""Every Triton kernel beside its torch reference: on the GPU at sizes and in types that models have, or, in
the interpreter, at toy sizes."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from pdserve.kernels import KernelRequirements
from pdserve.kernels.reference import TorchKernels, silu_mul as reference_silu_mul
from pdserve.kernels.triton.activation import silu_mul
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.norm import add_rms_norm, rms_norm
from pdserve.kernels.triton.rope_cache import rope_and_cache

from . import attention_checks, sampling_checks, wire_checks
from .batches import num_different, row_error, spoil_memory, worst
from .cases import TOLERANCES, Case
from .checks import run_checks
from .sections import Context

_EPS = 1e-6
_MAX_POSITION = 8192
_reference = TorchKernels()


def check(context: Context) -> None:
    run_checks(context, all_cases(context.device, context.interpret))


def all_cases(device: str, is_toy: bool) -> Iterator[Case]:
    yield from attention_checks.cases(device, is_toy)
    yield from _norms(device, is_toy)
    yield from _ropes(device, is_toy)
    yield from _activations(device, is_toy)
    yield from _products(device, is_toy)
    yield from sampling_checks.cases(device, is_toy)
    yield from wire_checks.cases(device, is_toy)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norms(device: str, is_toy: bool) -> Iterator[Case]:
    for dtype, width in [(torch.bfloat16, 80 if is_toy else 4096), (torch.float16, 64 if is_toy else 2048)]:
        num_tokens = 3 if is_toy else 257
        name = f"norm, {_short(dtype)}, {num_tokens} x {width}"
        yield Case(name, TOLERANCES[dtype], partial(_norm_error, dtype, num_tokens, width, device))
        error = partial(_residual_error, dtype, num_tokens, width, device)
        yield Case(f"{name}, with residual", TOLERANCES[dtype], error)


def _norm_error(dtype: torch.dtype, num_tokens: int, width: int, device: str) -> float:
    x, weight = torch.randn(num_tokens, width).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    spoil_memory(x.to(device))
    return row_error(
        rms_norm(x.to(device), weight.to(device), _EPS),
        _reference.rms_norm(x.double(), weight.double(), _EPS),
    )


def _residual_error(dtype: torch.dtype, num_tokens: int, width: int, device: str) -> float:
    """The error of the new residual and of its norm."""
    x, residual = torch.randn(2, num_tokens, width).to(dtype)
    weight, there = (torch.rand(width) + 0.5).to(dtype), residual.clone().to(device)
    spoil_memory(there)
    out = add_rms_norm(x.to(device), there, weight.to(device), _EPS)
    exact = _reference.add_rms_norm(x, residual, weight, _EPS)
    return worst(row_error(there, residual), row_error(out, exact))


def _ropes(device: str, is_toy: bool) -> Iterator[Case]:
    real = [
        ((32, 8, 128), 64, torch.bfloat16),
        ((32, 8, 64), 16, torch.float16),
        ((16, 8, 128), 64, torch.bfloat16),
    ]
    toy = [((8, 2, 128), 64, torch.bfloat16), ((4, 2, 64), 16, torch.float16)]
    for index, (heads, block_size, dtype) in enumerate(toy if is_toy else real):
        norms = index != 0  # Llama has none, Qwen3 has
        name = (
            f"rope and cache, {_short(dtype)}, {'/'.join(map(str, heads))}, page"
            f" {block_size}{', norms' if norms else ''}"
        )
        yield Case(
            name,
            TOLERANCES[dtype],
            partial(_rope_error, heads, block_size, dtype, norms, 5 if is_toy else 700, device),
        )


def _rope_error(
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    norms: bool,
    num_tokens: int,
    device: str,
) -> float:
    """The error of queries and keys; infinite where values, or slots without a token, are not identical."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = num_tokens // block_size + 3
    cache = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    angles = torch.rand(_MAX_POSITION, head_dim // 2) * 2 * math.pi
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions = torch.randint(_MAX_POSITION, (num_tokens,))
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[-1] = -1  # padding of a captured graph: nothing is written for it
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    q_norm, k_norm = (torch.rand(2, head_dim) + 0.5).to(dtype) if norms else (None, None)
    there = cache.clone().to(device)
    qkv_there, positions_there, cos_sin_there = (tensor.to(device) for tensor in (qkv, positions, cos_sin))
    q_there, k_there = (None if norm is None else norm.to(device) for norm in (q_norm, k_norm))
    inputs = qkv_there, positions_there, cos_sin_there, q_there, k_there
    q = rope_and_cache(*inputs, _EPS, there[0], there[1], slots.to(device))
    wide = cache.float()
    q_wide, k_wide = (None if norm is None else norm.float() for norm in (q_norm, k_norm))
    exact_q = _reference.rope_and_cache(
        qkv[:-1].float(), positions[:-1], cos_sin, q_wide, k_wide, _EPS, wide[0], wide[1], slots[:-1]
    )
    keys, exact_keys = (c[0].cpu().transpose(1, 2).flatten(0, 1) for c in (there, wide))
    untouched = torch.ones(len(keys), dtype=torch.bool)
    untouched[slots[:-1]] = False
    if num_different(there[1], wide[1].to(dtype)) or num_different(
        keys[untouched], exact_keys[untouched].to(dtype)
    ):
        return math.inf
    return worst(row_error(q[:-1], exact_q), row_error(keys, exact_keys))


def _activations(device: str, is_toy: bool) -> Iterator[Case]:
    for dtype, width in [
        (torch.bfloat16, 100 if is_toy else 14_336),
        (torch.float16, 64 if is_toy else 8192),
    ]:
        num_tokens = 3 if is_toy else 65
        name = f"silu and multiply, {_short(dtype)}, {num_tokens} x {width}"
        yield Case(name, TOLERANCES[dtype], partial(_silu_error, dtype, num_tokens, width, device))


def _silu_error(dtype: torch.dtype, num_tokens: int, width: int, device: str) -> float:
    gate_up = torch.randn(num_tokens, 2 * width).to(dtype)
    spoil_memory(gate_up.to(device)[:, :width].contiguous())
    return row_error(silu_mul(gate_up.to(device)), reference_silu_mul(gate_up.double()))


def _products(device: str, is_toy: bool) -> Iterator[Case]:
    num_in, num_out = (64, 300) if is_toy else (2048, 128_256)
    yield Case(
        f"logits in float32, bfloat16, {num_in} to {num_out}",
        1e-4,
        partial(_logits_error, num_in, num_out, device),
    )


def _logits_error(num_in: int, num_out: int, device: str) -> float:
    """bfloat16 times bfloat16 is exact in float32: only the sums round."""
    x, weight = (torch.randn(n, num_in, dtype=torch.bfloat16, device=device) for n in (9, num_out))
    kernels = TritonKernels(KernelRequirements(torch.bfloat16, head_dim=64, block_size=16))
    logits = kernels.linear(x, kernels.pack_linear(weight), torch.float32)
    exact = x.double() @ weight.double().t()
    wrong = num_different(kernels.argmax(logits), exact.argmax(dim=-1))
    return math.inf if wrong or logits.dtype != torch.float32 else row_error(logits, exact)
