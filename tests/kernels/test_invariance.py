"""A token's bits do not depend on other tokens computed in the same call: not on batch, chunking or
threads."""

import pytest
import torch

from pdserve.kernels import AttentionBatch, Kernels

from .conftest import MakeKernels, paged_batch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [2, 14, 31, 130])
def test_a_linear_row_is_the_same_alone_and_in_any_batch(
    native: MakeKernels, dtype: torch.dtype, num_tokens: int
) -> None:
    x, weight, up = (torch.randn(n, 320).to(dtype) for n in (num_tokens, 100, 100))
    for num_threads in (1, 3):
        kernels = native(dtype, num_threads)
        for packed, call in (
            (kernels.pack_linear(weight), kernels.linear),
            (kernels.pack_gate_up(weight, up), kernels.gated_linear),
        ):
            together = call(x, packed)
            assert all(torch.equal(call(x[t : t + 1], packed)[0], together[t]) for t in range(num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 80), (7, 1, 128)])
@pytest.mark.parametrize("window", [None, 100])
def test_prefill_chunked_prefill_and_decode_agree_bit_for_bit(
    native: MakeKernels,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
) -> None:
    num_tokens, block_size = 1200, 16
    batch, num_blocks = paged_batch([num_tokens], [num_tokens], block_size)
    q = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
    cache = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)

    def attend(kernels: Kernels, start: int, end: int) -> torch.Tensor:
        part = AttentionBatch(
            torch.tensor([0, end - start], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            batch.block_tables,
            batch.slot_mapping[start:end],
        )
        return kernels.paged_attention(q[start:end], cache[0], cache[1], part, head_dim**-0.5, window)

    whole = attend(native(dtype, 1), 0, num_tokens)
    for num_threads in (1, 3):
        kernels = native(dtype, num_threads)
        for start, end in [(0, 700), (700, 713), (713, 1200), *((t, t + 1) for t in range(0, 1200, 53))]:
            assert torch.equal(attend(kernels, start, end), whole[start:end]), (start, end)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_attends_the_same_alone_and_in_a_mixed_batch(
    native: MakeKernels, dtype: torch.dtype
) -> None:
    query_lens, context_lens = [1, 60, 1, 5], [900, 60, 3, 600]
    batch, num_blocks = paged_batch(query_lens, context_lens, 16)
    q = torch.randn(sum(query_lens), 8, 64).to(dtype)
    cache = torch.randn(2, num_blocks, 2, 16, 64).to(dtype)
    together = native(dtype, 2).paged_attention(q, cache[0], cache[1], batch, 0.125)
    for s, query_len in enumerate(query_lens):
        start = int(batch.query_start_loc[s])
        alone = AttentionBatch(
            torch.tensor([0, query_len], dtype=torch.int32),
            batch.context_lens[s : s + 1],
            batch.block_tables[s : s + 1],
            batch.slot_mapping[start : start + query_len],
        )
        rows = slice(start, start + query_len)
        out = native(dtype, 1).paged_attention(q[rows], cache[0], cache[1], alone, 0.125)
        assert torch.equal(out, together[rows])
