"""Attention of Triton's kernels beside the torch reference in float64, on the shapes of models that people
serve."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from pdserve.engine.device import CudaDevice, HostDevice
from pdserve.kernels import KernelRequirements
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton import paged_attention
from pdserve.kernels.triton.decode_attention import DecodeBatch, decode_attention, decode_workspace
from pdserve.kernels.triton.decode_plan import DecodeShape, plan_decode
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.prefill_plan import PrefillPlan, plan_prefill

from .batches import num_different, paged_batch, poison_unused, row_error, spoil_memory, worst
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
# Few tiles of queries over many keys, which are cut into pieces.
REAL_SPLIT = (
    Attention("prefill attention, split", _BF16, LLAMA_8B_HEADS, 64, (100, 33), (8192, 3000)),
    Attention("prefill attention, split", _FP16, _LLAMA_1B, 16, (100, 33), (8192, 3000)),
    Attention("prefill attention, split", _BF16, _QWEN3_06B, 64, (100, 33), (8192, 3000), 1024),
    Attention("prefill attention, split", _BF16, _QWEN2_7B, 128, (100, 33), (8192, 3000)),
    Attention("prefill attention, split", _FP32, _LLAMA_1B, 16, (100, 33), (4096, 3000)),
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


TOY_SPLIT = (
    Attention("prefill attention, split", _BF16, (8, 2, 128), 64, (20, 10), (600, 530)),
    Attention("prefill attention, split", _FP16, (4, 2, 64), 16, (20,), (600,), 300),
)
# Pages of 16 tokens: a context of 90 is in two pieces.
_TOY_CAPTURED = Attention("decode attention", _FP16, (4, 2, 64), 16, (1,) * 4, _SHORT)
_MULTIPROCESSORS = 132  # an H200's, by which prompts' keys are cut everywhere
# Fewer, so that a wave of programs is less than the pieces of a small batch.
_FEW_MULTIPROCESSORS, _FEW_TOY_MULTIPROCESSORS = 8, 1


def cases(device: str, is_toy: bool) -> Iterator[Case]:
    for attention in TOY if is_toy else REAL:
        yield Case(attention.name, TOLERANCES[attention.dtype], partial(_error, attention, device))
    for attention in TOY_SPLIT if is_toy else REAL_SPLIT:
        yield Case(attention.name, TOLERANCES[attention.dtype], partial(_split_error, attention, device))
    attention = _TOY_CAPTURED if is_toy else REAL[1]
    for takes_turns in (False, True):
        shape = DecodeShape(
            max_seqs=len(attention.context_lens),
            max_query_len=1,
            num_kv_heads=attention.heads[1],
            block_size=attention.block_size,
            num_multiprocessors=_FEW_TOY_MULTIPROCESSORS if is_toy else _FEW_MULTIPROCESSORS,
            takes_turns=takes_turns,
        )
        what = f"captured, {attention.name}{', programs take turns' if takes_turns else ''}"
        captured = partial(_Captured, attention, shape, device)
        yield Case(what, TOLERANCES[attention.dtype], partial(_captured_error, captured))
        num_replays = 3 if is_toy else 200
        yield Case(
            f"{what}, {num_replays} replays: the same bits",
            0.0,
            partial(_num_other_bits, captured, num_replays),
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


def _split_error(attention: Attention, device: str) -> float:
    """Infinite where no tile's keys were cut."""
    plans: list[PrefillPlan] = []

    def recorded(*arguments: Any) -> PrefillPlan:
        plans.append(plan_prefill(*arguments))
        return plans[-1]

    with (
        patch.object(paged_attention, "plan_prefill", recorded),
        patch.object(paged_attention, "num_multiprocessors", lambda _device: _MULTIPROCESSORS),
    ):
        error = _error(attention, device)
    return error if any(plan.pieces is not None for plan in plans) else math.inf


class _Captured:
    """Decode attention, captured once for batches whose queries, lengths and plan are copied to where the
    graph looks."""

    def __init__(self, attention: Attention, shape: DecodeShape, device: str) -> None:
        num_heads, _, head_dim = attention.heads
        on = CudaDevice() if device == "cuda" else HostDevice()
        there, (self.q, self.cache) = on.torch_device, _random(attention)
        self.shape, self.scale, self.longest = shape, head_dim**-0.5, max(attention.context_lens)
        self.context_lens = [*attention.context_lens]
        self.whole, _ = paged_batch([1] * shape.max_seqs, self.context_lens, attention.block_size)
        self.plan = plan_decode(shape, [1], [1], self.longest).to(device)
        self.batch = DecodeBatch(
            torch.arange(shape.max_seqs + 1, dtype=torch.int32, device=there),
            torch.ones(shape.max_seqs, dtype=torch.int32, device=there),
            self.whole.block_tables.to(there),
            self.plan,
        )
        self.workspace = decode_workspace(shape, num_heads, head_dim, self.longest, device)
        self.queries, self.out = self.q.to(there), torch.empty_like(self.q, device=there)
        keys, values = self.cache.to(there)

        def step() -> None:
            attended = decode_attention(self.queries, keys, values, self.batch, self.workspace, self.scale)
            self.out.copy_(attended.view(self.q.shape))

        step()
        self._graph = on.capture(step)

    def load(self, num_seqs: int) -> None:
        """The next replays are of the first sequences, with other queries."""
        lengths = self.context_lens[:num_seqs]
        todays = plan_decode(self.shape, [1] * num_seqs, lengths, self.longest)
        self.q = torch.randn(self.q.shape).to(self.q.dtype)
        self.queries.copy_(self.q)
        self.batch.context_lens[:num_seqs].copy_(torch.tensor(lengths, dtype=torch.int32))
        self.plan.pieces.copy_(todays.pieces)
        self.plan.partial_start.copy_(todays.partial_start)

    def replay(self) -> torch.Tensor:
        self.out.fill_(torch.nan)
        self._graph.replay()
        return self.out


def _captured_error(capture: Callable[[], _Captured]) -> float:
    captured = capture()
    size, starts = captured.shape.max_seqs, torch.arange(captured.shape.max_seqs + 1, dtype=torch.int32)
    errors = []
    for used in (size, size // 2, 1):
        captured.load(used)
        out = captured.replay()[:used]
        todays_batch = replace(
            captured.whole,
            query_start_loc=starts[: used + 1],
            context_lens=torch.tensor(captured.context_lens[:used], dtype=torch.int32),
            block_tables=captured.whole.block_tables[:used],
        )
        keys, values = captured.cache.double()
        q = captured.q[:used].double()
        exact = TorchKernels().paged_attention(q, keys, values, todays_batch, captured.scale)
        errors.append(row_error(out, exact.view(q.shape)))
    return worst(*errors)


def _num_other_bits(capture: Callable[[], _Captured], num_replays: int) -> float:
    """The numbers of all replays that differ from the first's: whichever piece of a sequence is done last
    merges, and the result must not show which. Infinite where no sequence is split, or a count is left."""
    captured = capture()
    captured.load(captured.shape.max_seqs)
    first = captured.replay().clone()
    different = sum(num_different(captured.replay(), first) for _ in range(num_replays))
    is_split = bool(captured.plan.partial_start[-1])
    return math.inf if not is_split or captured.workspace.arrivals.any() else float(different)
