"""The device of Triton's kernels in tests, and the tolerances for their results."""

import torch

from pdserve.kernels import AttentionBatch

from ..conftest import paged_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_close_in_dtype(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Compares `actual` in its dtype with the float64 result: errors are in units of that dtype's
    precision."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[actual.dtype]
    error = (actual.cpu().double() - exact).abs().max().item()
    assert error <= tolerance * max(1.0, exact.abs().max().item()), error


def poison_unused_slots(cache: torch.Tensor, batch: AttentionBatch, block_size: int) -> None:
    """Fills slots that hold no token of the batch with NaN: no result may depend on them."""
    used = torch.zeros(cache.shape[1], block_size, dtype=torch.bool)
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        keys = torch.arange(length)
        used[table[keys // block_size].long(), keys % block_size] = True
    cache.masked_fill_(~used[None, :, None, :, None], torch.nan)


def random_case(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    lens: tuple[list[int], list[int]],
) -> tuple[AttentionBatch, torch.Tensor, torch.Tensor]:
    """A batch of these query and context lengths, its queries, and keys and values surrounded by NaN."""
    batch, num_blocks = paged_batch(*lens, block_size)
    q = torch.randn(sum(lens[0]), num_heads, head_dim).to(dtype)
    cache = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    poison_unused_slots(cache, batch, block_size)
    return batch, q, cache
