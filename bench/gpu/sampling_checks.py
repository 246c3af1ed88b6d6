"""Drawn tokens beside the reference's: the same random numbers, so the same tokens; and a grammar's masks."""

from collections.abc import Iterator
from functools import partial

import torch

from pdserve.kernels.sampling import SamplingBatch, sample as reference_sample
from pdserve.kernels.triton.sampling import sample
from pdserve.kernels.triton.token_mask import mask_tokens

from .batches import num_different
from .cases import Case

_FILTERS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 0.95, 0.0),
    (0.7, 40, 0.8, 0.02),
    (1.5, 5000, 0.95, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
]


def cases(device: str, is_toy: bool) -> Iterator[Case]:
    for vocab_size in (500,) if is_toy else (128_256, 151_936, 50_257):
        yield Case(
            f"sampling, {vocab_size} tokens", 0.0, partial(_error, vocab_size, 2 if is_toy else 8, device)
        )
        yield Case(f"a grammar's masks, {vocab_size} tokens", 0.0, partial(_mask_error, vocab_size, device))


def _error(vocab_size: int, num_rows: int, device: str) -> float:
    """The number of draws that differ; every filter on every row, and one row of equal logits."""
    logits = torch.randn(num_rows, vocab_size) * 4
    logits[0] = 0.0
    filters = _FILTERS * num_rows
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    count = len(filters)
    batch = SamplingBatch(
        rows=torch.arange(num_rows, dtype=torch.int32).repeat_interleave(len(_FILTERS)),
        temperature=torch.tensor(temperature, dtype=torch.float64),
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p, dtype=torch.float64),
        min_p=torch.tensor(min_p, dtype=torch.float64),
        seed=torch.randint(-(2**62), 2**62, (count,)),
        choice=torch.arange(count, dtype=torch.int32) % 3,
        index=torch.arange(count, dtype=torch.int32),
    )
    return num_different(sample(logits.to(device), batch.to(device)), reference_sample(logits, batch))


def _mask_error(vocab_size: int, device: str) -> float:
    """The number of incorrect logits; one row of three has no mask."""
    logits, rows = torch.randn(3, vocab_size), torch.tensor([2, 0], dtype=torch.int32)
    bits = torch.randint(256, (2, -(-vocab_size // 8)), dtype=torch.uint8)
    allowed = torch.stack([bits >> bit & 1 for bit in range(8)], dim=-1).flatten(1)[:, :vocab_size].bool()
    masked = logits.clone().to(device)
    mask_tokens(masked, rows.to(device), bits.to(device))
    logits[rows.long()] = logits[rows.long()].masked_fill(~allowed, -torch.inf)
    return num_different(masked, logits)
