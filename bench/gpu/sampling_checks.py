"""Drawn tokens beside the reference's: the same random numbers, so the same tokens."""

from collections.abc import Iterator
from functools import partial

import torch

from pdserve.kernels.sampling import SamplingBatch, sample as reference_sample
from pdserve.kernels.triton.sampling import sample

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
        yield Case(f"sampling, {vocab_size} tokens", 0.0, partial(_error, vocab_size, 2 if is_toy else 8, device))


def _error(vocab_size: int, num_rows: int, device: str) -> float:
    """How many of the draws differ; every filter on every row, and one row of equal logits."""
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
