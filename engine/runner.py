"""Runs one step: a scheduler's batch in, sampled tokens out. Sequences are not changed; the scheduler
advances them."""

from collections.abc import Callable

import torch

from ..kernels import Kernels
from .batch import Batch, CompletedStep
from .inputs import InputBuilder
from .kv_cache import KVCache
from .model import Model, ModelInput
from .prompt_logprobs import PromptLogprobs
from .sampler import Sampler

BeginStep = Callable[[Batch, ModelInput], None]


class ModelRunner:
    """One model on the CPU. Used by one thread."""

    runs_ahead = False

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        kernels: Kernels,
        max_model_len: int,
        begin_step: BeginStep | None = None,
    ) -> None:
        """`begin_step` has the other ranks of an instance compute their part of a step. A runner with one
        raises RankLost from `launch`."""
        self._begin_step = begin_step
        self._model = model
        self._cache = cache
        self._sampler = Sampler(kernels)
        self._prompts = PromptLogprobs(model)
        self._inputs = InputBuilder(cache.layout.block_size, max_model_len)

    @torch.inference_mode()
    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> CompletedStep:
        """See `batch.Runner`. The batch's block copies are made first."""
        if batch.copies:
            self._cache.copy_blocks(batch.copies)
        inputs = self._inputs.build(batch)
        if self._begin_step is not None:
            self._begin_step(batch, inputs)
        hidden = self._model.forward(inputs, self._cache, on_layer)
        if inputs.needs_all_rows:
            self._prompts.add(batch.chunks, hidden)
            hidden = hidden if inputs.sampled is None else hidden[inputs.sampled.rows]
        logits = self._model.logits(hidden)
        sampled = [chunk for chunk in batch.chunks if chunk.choices]
        if before_sampling is not None:
            before_sampling()
            rows = [row for row, chunk in enumerate(sampled) if chunk.sequence.may_sample]
            logits, sampled = logits[rows], [sampled[row] for row in rows]
        drawn = dict(zip(map(id, sampled), self._sampler.sample(logits, sampled), strict=True))
        return CompletedStep(
            [self._prompts.complete(chunk, drawn.get(id(chunk), [])) for chunk in batch.chunks]
        )
