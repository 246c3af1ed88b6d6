"""Each native operation computes what the torch reference computes in float64."""

import pytest
import torch

from pdserve.kernels import AttentionBatch
from pdserve.kernels.reference import TorchKernels

from .conftest import MakeKernels, assert_close, paged_batch

DTYPES = [torch.float32, torch.bfloat16]
reference = TorchKernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (50, 24), (1, 8), (300, 514), (33, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 13, 14, 15, 29, 200])
def test_linear(native: MakeKernels, dtype: torch.dtype, num_out: int, num_in: int, num_tokens: int) -> None:
    kernels = native(dtype)
    x, weight, bias = torch.randn(num_tokens, num_in).to(dtype), torch.randn(num_out, num_in).to(dtype), torch.randn(num_out)
    exact = x.double() @ weight.double().T
    assert_close(kernels.linear(x, kernels.pack_linear(weight)), exact)
    biased = kernels.linear(x, kernels.pack_linear(weight, bias.to(dtype)), torch.float32)
    assert biased.dtype == torch.float32
    assert_close(biased, exact + bias.to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (50, 24), (7, 130)])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_gated_linear(native: MakeKernels, dtype: torch.dtype, num_out: int, num_in: int, num_tokens: int) -> None:
    kernels = native(dtype)
    x = torch.randn(num_tokens, num_in).to(dtype)
    gate, up = torch.randn(2, num_out, num_in).to(dtype)
    exact = reference.gated_linear(x.double(), reference.pack_gate_up(gate.double(), up.double()))
    assert_close(kernels.gated_linear(x, kernels.pack_gate_up(gate, up)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (3, 40), (70, 768), (33, 900)])
def test_norms(native: MakeKernels, dtype: torch.dtype, num_tokens: int, width: int) -> None:
    kernels = native(dtype)
    x, residual = torch.randn(2, num_tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    added = residual.double() + x.double()
    normed = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(residual, added)
    assert_close(normed, reference.rms_norm(residual.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(4, 2, 64, 16), (3, 3, 24, 8), (8, 1, 80, 32)]
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache(
    native: MakeKernels,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    with_norm: bool,
) -> None:
    kernels = native(dtype)
    batch, num_blocks = paged_batch([1, 40], [9, 45], block_size)
    qkv = torch.randn(41, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions = torch.cat((torch.tensor([8]), torch.arange(5, 45)))
    cos_sin = torch.rand(50, head_dim)
    norms = [torch.rand(head_dim).to(dtype) for _ in range(2)] if with_norm else [None, None]
    cache = torch.zeros(1, 2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)
    q = kernels.rope_and_cache(qkv, positions, cos_sin, *norms, 1e-6, cache[0, 0], cache[0, 1], batch.slot_mapping)
    exact_norms = [None if norm is None else norm.double() for norm in norms]
    exact = torch.zeros_like(cache, dtype=torch.float64)
    exact_q = TorchKernels().rope_and_cache(
        qkv.double(), positions, cos_sin, *exact_norms, 1e-6, exact[0, 0], exact[0, 1], batch.slot_mapping
    )
    assert_close(q, exact_q)
    assert_close(cache, exact)


ATTENTION_SHAPES = [  # query heads, kv heads, head_dim, block_size
    (4, 4, 64, 16),
    (14, 2, 64, 16),
    (6, 2, 128, 32),
    (8, 1, 256, 64),
    (4, 2, 80, 8),
    (3, 3, 16, 24),
    (32, 2, 96, 16),
]
ATTENTION_BATCHES = [  # query lengths, context lengths, sliding window
    ([1], [1], None),
    ([1, 1, 1], [7, 64, 700], None),
    ([100], [100], None),
    ([33, 1, 200, 2], [33, 90, 730, 513], None),
    ([1, 150], [600, 640], 40),
    ([20], [1100], 530),
    ([5], [64], 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), ATTENTION_SHAPES)
@pytest.mark.parametrize(("query_lens", "context_lens", "window"), ATTENTION_BATCHES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_paged_attention(
    native: MakeKernels,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    query_lens: list[int],
    context_lens: list[int],
    window: int | None,
    num_threads: int,
) -> None:
    kernels = native(dtype, num_threads)
    batch, num_blocks = paged_batch(query_lens, context_lens, block_size)
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    cache = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    _poison_unused_slots(cache, batch, block_size)
    out = kernels.paged_attention(q, cache[0], cache[1], batch, head_dim**-0.5, window)
    exact = reference.paged_attention(q.double(), *cache.double(), batch, head_dim**-0.5, window)
    assert_close(out, exact)


def _poison_unused_slots(cache: torch.Tensor, batch: AttentionBatch, block_size: int) -> None:
    """Slots that hold no token of the batch become NaN: nothing may come of reading them."""
    used = torch.zeros(cache.shape[1], block_size, dtype=torch.bool)
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        keys = torch.arange(length)
        used[table[keys // block_size].long(), keys % block_size] = True
    cache.masked_fill_(~used[None, :, None, :, None], torch.nan)


def test_argmax_takes_the_first_of_equal_maxima(native: MakeKernels) -> None:
    logits = torch.randn(5, 1003)
    logits[1, [400, 401, 900]] = 50.0
    logits[2, 1002] = 50.0
    logits[3] = -torch.inf
    assert native(torch.float32).argmax(logits).tolist() == logits.argmax(-1).tolist()
