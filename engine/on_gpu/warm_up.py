"""Steps that run before any request: they compile the kernels, and show how much memory a step takes."""

from dataclasses import fields

import torch

from ...kernels import AttentionBatch
from ...kernels.sampling import SamplingBatch, column_dtype
from ...kernels.triton.sampling import sample
from ...kernels.triton.token_mask import mask_tokens
from ..device import Device
from ..kv_cache import KVCache
from ..model import Model, ModelInput

# Chunks of these lengths take each kernel of attention that there is: by a few queries, rounded up, and by
# many.
_CHUNK_LENGTHS = (2, 4, 8, 64)


@torch.inference_mode()
def prompt_step(
    device: Device,
    model: Model,
    cache: KVCache,
    lengths: list[int],
    max_model_len: int,
    num_cached_tokens: int = 0,
) -> None:
    """Runs a step of prompts of these lengths, each behind a cached prefix. Its results are meaningless:
    all keys are in block 0 of `cache`, one on the other."""
    there, size = device.torch_device, cache.layout.block_size
    positions = torch.cat([torch.arange(length) for length in lengths]) + num_cached_tokens
    batch = AttentionBatch(
        query_start_loc=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32) + num_cached_tokens,
        # As wide as those of real steps: a kernel is compiled for a width.
        block_tables=torch.zeros((len(lengths), -(-max_model_len // size)), dtype=torch.int32),
        slot_mapping=(positions % size).to(there),
    )
    model.forward(ModelInput(torch.zeros_like(positions).to(there), positions.to(there), batch, None), cache)


@torch.inference_mode()
def warm_up(device: Device, model: Model, cache: KVCache, max_model_len: int) -> None:
    """Warms up all that requests may need besides captured graphs. The cache must still be empty: block 0 is
    written to."""
    for length in _CHUNK_LENGTHS:
        prompt_step(device, model, cache, [min(length, max_model_len)], max_model_len)
    last = _CHUNK_LENGTHS[-1]
    if (
        max_model_len > last
    ):  # and that many behind all the cached tokens that there may be, whose keys are shared out
        prompt_step(device, model, cache, [last], max_model_len, max_model_len - last)
    there, vocab_size = device.torch_device, model.config.vocab_size
    logits = torch.zeros((1, vocab_size), device=there)
    bits = torch.full((1, -(-vocab_size // 8)), 255, dtype=torch.uint8, device=there)
    mask_tokens(logits, torch.zeros(1, dtype=torch.int32, device=there), bits)
    columns = {
        field.name: torch.zeros(1, dtype=column_dtype(field.name), device=there)
        for field in fields(SamplingBatch)
    }
    sample(
        logits,
        SamplingBatch(**columns | {"temperature": columns["temperature"] + 1, "top_p": columns["top_p"] + 1}),
    )
    event = device.event()
    event.record()
    event.synchronize()
