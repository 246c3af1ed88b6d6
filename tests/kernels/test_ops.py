"""Each operation, native or in Triton, computes the same as the torch reference in float64."""

import pytest
import torch

from pdserve.kernels import AttentionBatch
from pdserve.kernels.reference import TorchKernels

from .conftest import NATIVE, assert_close, halves, make_subject, paged_batch

DTYPES = [torch.float32, torch.bfloat16]
NAMES = [*NATIVE, "triton"]
reference = TorchKernels()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (50, 24), (1, 8), (300, 514), (33, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 13, 14, 15, 29, 200])
def test_linear(name: str, dtype: torch.dtype, num_out: int, num_in: int, num_tokens: int) -> None:
    subject = make_subject(name, dtype)
    x, weight, bias = (
        torch.randn(num_tokens, num_in).to(dtype),
        torch.randn(num_out, num_in).to(dtype),
        torch.randn(num_out),
    )
    exact = x.double() @ weight.double().T
    exact_biased = exact + bias.to(dtype).double()
    kernels, (x, weight, bias) = subject.kernels, subject.there(x, weight, bias.to(dtype))
    assert_close(kernels.linear(x, kernels.pack_linear(weight)), exact)
    assert_close(kernels.linear(x, kernels.pack_linear(weight, bias)), exact_biased)
    biased = kernels.linear(x, kernels.pack_linear(weight, bias), torch.float32)
    assert biased.dtype == torch.float32
    assert_close(biased, exact_biased)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (50, 24), (7, 130)])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_gated_linear(name: str, dtype: torch.dtype, num_out: int, num_in: int, num_tokens: int) -> None:
    subject = make_subject(name, dtype)
    x = torch.randn(num_tokens, num_in).to(dtype)
    gate, up = torch.randn(2, num_out, num_in).to(dtype)
    exact = reference.gated_linear(x.double(), reference.pack_gate_up(gate.double(), up.double()))
    kernels, (x, gate, up) = subject.kernels, subject.there(x, gate, up)
    assert_close(kernels.gated_linear(x, kernels.pack_gate_up(gate, up)), exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (3, 40), (70, 768), (33, 900)])
def test_norms(name: str, dtype: torch.dtype, num_tokens: int, width: int) -> None:
    subject = make_subject(name, dtype)
    x, residual = torch.randn(2, num_tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
    added = residual.double() + x.double()
    kernels, (x, residual, weight) = subject.kernels, subject.there(x, residual, weight)
    assert_close(kernels.rms_norm(x, weight, 1e-5), exact)
    normed = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(residual, added)
    assert_close(normed, reference.rms_norm(residual.cpu().double(), weight.cpu().double(), 1e-5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(4, 2, 64, 16), (3, 3, 24, 8), (8, 1, 80, 32)]
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache(
    name: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    with_norm: bool,
) -> None:
    subject = make_subject(name, dtype)
    batch, num_blocks = paged_batch([1, 12], [9, 40], block_size)  # across a page's end
    qkv = torch.randn(13, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions = torch.cat((torch.tensor([8]), torch.arange(28, 40)))
    cos_sin = torch.rand(50, head_dim)
    norms = [torch.rand(head_dim).to(dtype) for _ in range(2)] if with_norm else [None, None]
    cache = torch.zeros(
        1, 2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=subject.device
    )
    device_norms = [None if norm is None else norm.to(subject.device) for norm in norms]
    # fmt: off
    q = subject.kernels.rope_and_cache(
        qkv.to(subject.device), positions, cos_sin.to(subject.device), device_norms[0], device_norms[1], 1e-6,
        cache[0, 0], cache[0, 1], batch.slot_mapping,
    )
    # fmt: on
    exact_norms = [None if norm is None else norm.double() for norm in norms]
    exact = torch.zeros_like(cache, dtype=torch.float64, device="cpu")
    q_norm, k_norm = exact_norms
    exact_q = TorchKernels().rope_and_cache(
        qkv.double(), positions, cos_sin, q_norm, k_norm, 1e-6, exact[0, 0], exact[0, 1], batch.slot_mapping
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
    ([33, 1, 140, 2], [33, 90, 430, 387], None),
    ([1, 150], [600, 640], 40),
    ([20], [1100], 530),
    ([5], [64], 1),
]


ATTENTION_SUBJECTS = [  # name, type, threads, shape
    *(
        (level, dtype, num_threads, shape)
        for level in NATIVE
        for dtype in DTYPES
        for shape in ATTENTION_SHAPES
        for num_threads in (1, 3)
    ),
    ("triton", torch.float32, 1, (4, 2, 80, 8)),  # the interpreter is slow
    ("triton", torch.bfloat16, 1, (3, 3, 16, 24)),
]


@pytest.mark.parametrize(("name", "dtype", "num_threads", "shape"), ATTENTION_SUBJECTS)
@pytest.mark.parametrize(("query_lens", "context_lens", "window"), ATTENTION_BATCHES)
def test_paged_attention(
    name: str,
    dtype: torch.dtype,
    num_threads: int,
    shape: tuple[int, int, int, int],
    query_lens: list[int],
    context_lens: list[int],
    window: int | None,
) -> None:
    subject = make_subject(name, dtype, num_threads)
    num_heads, num_kv_heads, head_dim, block_size = shape
    batch, num_blocks = paged_batch(query_lens, context_lens, block_size)
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    cache = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    _poison_unused_slots(cache, batch, block_size)
    there, (k_cache, v_cache) = q.to(subject.device), cache.to(subject.device)
    out = subject.kernels.paged_attention(there, k_cache, v_cache, batch, head_dim**-0.5, window)
    exact = reference.paged_attention(q.double(), *halves(cache.double()), batch, head_dim**-0.5, window)
    assert_close(out, exact)


def _poison_unused_slots(cache: torch.Tensor, batch: AttentionBatch, block_size: int) -> None:
    """Fills slots that hold no token of the batch with NaN: no result may depend on them."""
    used = torch.zeros(cache.shape[1], block_size, dtype=torch.bool)
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        keys = torch.arange(length)
        used[table[keys // block_size].long(), keys % block_size] = True
    cache.masked_fill_(~used[None, :, None, :, None], torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_argmax_takes_the_first_of_equal_maxima(name: str) -> None:
    logits = torch.randn(5, 1003)
    logits[1, [400, 401, 900]] = 50.0
    logits[2, 1002] = 50.0
    logits[3] = -torch.inf
    subject = make_subject(name, torch.bfloat16)
    assert subject.kernels.argmax(logits.to(subject.device)).tolist() == logits.argmax(-1).tolist()
