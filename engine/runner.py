"""Runs one step: a scheduler's batch in, sampled tokens out. Sequences are not changed; the scheduler advances them."""

from collections.abc import Callable

import torch

from ..kernels import Kernels
from .batch import Batch, SampledToken
from .inputs import InputBuilder
from .kv_cache import KVCache
from .model import Model
from .sampler import Sampler


class ModelRunner:
    """One model on one device. Used by one thread."""

    def __init__(self, model: Model, cache: KVCache, kernels: Kernels, max_model_len: int) -> None:
        self._model = model
        self._cache = cache
        self._sampler = Sampler(kernels)
        self._inputs = InputBuilder(cache.layout.block_size, max_model_len)

    @torch.inference_mode()
    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> list[list[SampledToken]]:
        """The tokens sampled for each chunk, one per entry of `chunk.choices`.

        The batch's block copies are made first. `on_layer(i)` is called when the KV of the batch's tokens is final in layer i.
        """
        if batch.copies:
            self._cache.copy_blocks(batch.copies)
        logits = self._model.forward(self._inputs.build(batch), self._cache, on_layer)
        drawn = iter(self._sampler.sample(logits, [chunk for chunk in batch.chunks if chunk.choices]))
        return [next(drawn) if chunk.choices else [] for chunk in batch.chunks]
