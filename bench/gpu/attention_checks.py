"""Attention of Triton's kernels beside the torch reference in float64, on the shapes of models that people
serve."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from pdserve.engine.device import CudaDevice, HostDevice
from pdserve.kernels import KernelRequirements
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.decode_attention import DecodeBatch, decode_attention, decode_workspace
from pdserve.kernels.triton.decode_plan import DecodeShape, plan_decode
from pdserve.kernels.triton.kernels import TritonKernels

from .batches import paged_batch, poison_unused, row_error, spoil_memory, worst
from .cases import TOLERANCES, Case


@dataclass(frozen=True)
class Attention:
    """Query heads, kv heads, head_dim; the cache's pages; and one batch."""

    what: str
    dtype: torch.dtype
    heads: tuple[int, int, int]
    block_size: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    window: int | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.what}, {dtype}, {'/'.join(map(str, self.heads))}, page {self.block_size}{window}"


LLAMA_8B_HEADS = (32, 8, 128)
_LLAMA_1B, _QWEN3_06B, _QWEN2_7B = (32, 8, 64), (16, 8, 128), (28, 4, 128)
_UNEVEN = (4096, 1, 63, 64, 65, 2047, 4095, 700)
_PROMPTS = (
    (1000, 1, 129, 500),
    (1000, 700, 1153, 2548),
)  # whole, a decode among prompts, and two with a cached prefix
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

REAL = (
    Attention("decode attention", _BF16, LLAMA_8B_HEADS, 64, (1,) * 32, (4096,) * 32),
    Attention("decode attention", _BF16, LLAMA_8B_HEADS, 64, (1,) * 8, _UNEVEN),
    Attention("decode attention", _FP16, _LLAMA_1B, 16, (1,) * 8, _UNEVEN),
    Attention("decode attention", _BF16, _QWEN3_06B, 64, (1,) * 8, _UNEVEN, 1024),
    Attention("decode attention", _BF16, _QWEN2_7B, 16, (1,), (8192,)),
    Attention("decode attention, 1 to 8 queries", _BF16, LLAMA_8B_HEADS, 64, (8, 1, 3), (2000, 1, 65)),
    Attention("decode attention", _FP32, _LLAMA_1B, 16, (1,) * 8, _UNEVEN),
    Attention("prefill attention", _BF16, LLAMA_8B_HEADS, 64, (2048,), (2048,)),
    Attention("prefill attention", _BF16, LLAMA_8B_HEADS, 64, *_PROMPTS),
    Attention("prefill attention", _FP16, _LLAMA_1B, 16, *_PROMPTS),
    Attention("prefill attention", _BF16, _QWEN3_06B, 64, *_PROMPTS, 256),
    Attention("prefill attention", _BF16, _QWEN2_7B, 128, *_PROMPTS),
    Attention("prefill attention", _FP32, _LLAMA_1B, 16, *_PROMPTS),
)
_SHORT = (90, 1, 16, 17)
TOY = (
    Attention("decode attention", _BF16, (8, 2, 128), 64, (1,) * 4, _SHORT),
    Attention("decode attention", _FP16, (4, 2, 64), 16, (1,) * 4, _SHORT, 20),
    Attention("decode attention, 1 to 8 queries", _FP32, (4, 1, 64), 16, (8, 1, 3), (90, 1, 17)),
    Attention("prefill attention", _BF16, (8, 2, 128), 64, (70, 1, 20), (70, 30, 90)),
    Attention("prefill attention", _FP16, (4, 2, 64), 16, (70, 1, 20), (70, 30, 90), 24),
    Attention("prefill attention", _FP32, (3, 1, 64), 16, (33,), (40,)),
)


def cases(device: str, is_toy: bool) -> Iterator[Case]:
    for attention in TOY if is_toy else REAL:
        yield Case(attention.name, TOLERANCES[attention.dtype], partial(_error, attention, device))
    attention = TOY[0] if is_toy else REAL[1]
    yield Case(
        f"captured, {attention.name}",
        TOLERANCES[attention.dtype],
        partial(_captured_error, attention, device),
    )


def _random(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, Hq, D], and a cache [2, blocks, Hkv, block_size, D]."""
    num_heads, num_kv_heads, head_dim = attention.heads
    _, num_blocks = paged_batch([*attention.query_lens], [*attention.context_lens], attention.block_size)
    q = torch.randn(sum(attention.query_lens), num_heads, head_dim).to(attention.dtype)
    cache = torch.randn(2, num_blocks, num_kv_heads, attention.block_size, head_dim).to(attention.dtype)
    return q, cache


def _error(attention: Attention, device: str) -> float:
    q, cache = _random(attention)
    batch, _ = paged_batch([*attention.query_lens], [*attention.context_lens], attention.block_size)
    poison_unused(cache, batch)
    scale = attention.heads[2] ** -0.5
    kernels = TritonKernels(KernelRequirements(attention.dtype, attention.heads[2], attention.block_size))
    there = cache.to(device)
    spoil_memory(there.new_empty(q.shape))
    out = kernels.paged_attention(q.to(device), there[0], there[1], batch, scale, attention.window)
    keys, values = cache.double()
    exact = TorchKernels().paged_attention(q.double(), keys, values, batch, scale, attention.window)
    return row_error(out.view(q.shape), exact.view(q.shape))


def _captured_error(attention: Attention, device: str) -> float:
    """Captured once, replayed on batches whose queries, lengths and plan were copied to where the graph
    looks."""
    num_heads, num_kv_heads, head_dim = attention.heads
    scale, block_size, longest = head_dim**-0.5, attention.block_size, max(attention.context_lens)
    size, on = len(attention.context_lens), CudaDevice() if device == "cuda" else HostDevice()
    there, (q, cache) = on.torch_device, _random(attention)
    whole, _ = paged_batch([1] * size, [*attention.context_lens], block_size)
    shape = DecodeShape(size, 1, num_kv_heads, block_size, num_multiprocessors=8)
    plan = plan_decode(shape, [1], [1], longest).to(device)
    starts, tables = torch.arange(size + 1, dtype=torch.int32), whole.block_tables
    batch = DecodeBatch(
        starts.to(there), torch.ones(size, dtype=torch.int32, device=there), tables.to(there), plan
    )
    workspace = decode_workspace(shape, num_heads, head_dim, longest, device)
    queries, keys, values, out = (
        q.to(there),
        cache[0].to(there),
        cache[1].to(there),
        torch.empty_like(q, device=there),
    )

    def step() -> None:
        out.copy_(decode_attention(queries, keys, values, batch, workspace, scale).view(q.shape))

    step()
    graph = on.capture(step)
    errors = []
    for used in (size, size // 2, 1):
        lengths = [*attention.context_lens[:used]]
        todays = plan_decode(shape, [1] * used, lengths, longest)
        q = torch.randn(q.shape).to(q.dtype)
        on_host = (q, torch.tensor(lengths, dtype=torch.int32), todays.pieces, todays.partial_start)
        for where, what in zip(
            (queries, batch.context_lens[:used], plan.pieces, plan.partial_start), on_host, strict=True
        ):
            where.copy_(what)
        out.fill_(torch.nan)
        graph.replay()
        todays_batch = replace(
            whole, query_start_loc=starts[: used + 1], context_lens=on_host[1], block_tables=tables[:used]
        )
        keys, values = cache.double()
        exact = TorchKernels().paged_attention(q[:used].double(), keys, values, todays_batch, scale)
        errors.append(row_error(out[:used], exact.view(q[:used].shape)))
    return worst(*errors)
