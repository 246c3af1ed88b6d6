"""Runs one step: a scheduler's batch in, sampled tokens out. Sequences are not changed; the scheduler advances them."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..kernels import Kernels
from .batch import Batch, SampledToken, ScheduledChunk
from .inputs import InputBuilder
from .kv_cache import KVCache
from .model import Model
from .prompt_logprobs import PromptLogprobs
from .sampler import Sampler


class ModelRunner:
    """One model on one device. Used by one thread."""

    def __init__(self, model: Model, cache: KVCache, kernels: Kernels, max_model_len: int) -> None:
        self._model = model
        self._cache = cache
        self._sampler = Sampler(kernels)
        self._prompts = PromptLogprobs(model)
        self._inputs = InputBuilder(cache.layout.block_size, max_model_len)

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> list[list[SampledToken]]:
        """The tokens sampled for each chunk, one per entry of `chunk.choices`; see `batch.Runner`. The batch's block copies are
        made first."""
        if batch.copies:
            self._cache.copy_blocks(batch.copies)
        inputs = self._inputs.build(batch)
        hidden = self._model.forward(inputs, self._cache, on_layer)
        if inputs.needs_all_rows:
            self._prompts.add(batch.chunks, hidden)
            hidden = hidden if inputs.sampled is None else hidden[inputs.sampled.rows]
        logits = self._model.logits(hidden)
        sampled = [chunk for chunk in batch.chunks if chunk.choices]
        if before_sampling is None:
            drawn = iter(self._sampler.sample(logits, sampled))
            return [self._with_prompt(chunk, next(drawn)) if chunk.choices else [] for chunk in batch.chunks]
        before_sampling()
        rows = [row for row, chunk in enumerate(sampled) if chunk.sequence.may_sample]
        drawn = iter(self._sampler.sample(logits[rows], [sampled[row] for row in rows]))
        return [
            self._with_prompt(chunk, next(drawn)) if chunk.choices and chunk.sequence.may_sample else []
            for chunk in batch.chunks
        ]

    def _with_prompt(self, chunk: ScheduledChunk, tokens: list[SampledToken]) -> list[SampledToken]:
        """What the prompt's tokens brought goes with the first token of choice 0."""
        logprobs = self._prompts.take(chunk.sequence)
        if not logprobs:
            return tokens
        first = chunk.choices.index(0)
        return [*tokens[:first], replace(tokens[first], prompt_logprobs=logprobs), *tokens[first + 1 :]]
