"""Chunks whose last rows are to be sampled, in the form that a scheduler passes them, and logits for them."""

from typing import Any

import numpy as np
import torch

from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import ScheduledChunk
from pdserve.engine.sequence import Sequence

VOCAB_SIZE = 50


def make_chunk(
    prompt: list[int] | None = None, output: tuple[int, ...] = (), **sampling: Any
) -> ScheduledChunk:
    params = SamplingParams(**({"max_tokens": 1000} | sampling))
    spec = SequenceSpec(
        transfer=TransferId("r", 0),
        prompt_token_ids=tuple(prompt or [1, 2, 3]),
        sampling=params,
        choices=tuple(range(params.n)),
        output_token_ids=output,
        eos_token_ids=(5,),
    )
    seq = Sequence(spec, 0, 10_000)
    seq.num_computed_tokens = seq.num_tokens - 1
    return ScheduledChunk(seq, 1, spec.choices)


def random_logits(seed: int, num_rows: int = 1, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def follow(chunk: ScheduledChunk, *allowed: int, vocab_size: int = VOCAB_SIZE) -> ScheduledChunk:
    """With the mask that the grammar process would report."""
    bits = np.zeros(vocab_size, dtype=np.bool_)
    bits[list(allowed)] = True
    chunk.sequence.token_mask = np.packbits(bits, bitorder="little").tobytes() + b"\0\0\0\0"
    return chunk
