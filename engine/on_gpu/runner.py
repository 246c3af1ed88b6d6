"""Runs steps on a GPU. Nothing here waits for the device until a step's tokens are collected, so that the
host prepares a step while the previous one is computed.

A step in which every sequence has one token replays a captured graph (`decode_graphs.py`); any other is
queued kernel by kernel, which its many tokens hide."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ...kernels.triton.kernels import TritonKernels
from ...kernels.triton.paged_attention import to_device
from ..batch import Batch, Launched, SampledToken, ScheduledChunk
from ..device import Device
from ..inputs import InputBuilder
from ..kv_cache import KVCache
from ..model import Model, ModelInput
from ..prompt_logprobs import PromptLogprobs
from .decode_graphs import DecodeGraphs
from .drawn_tokens import KNOWN, DrawnTokens
from .sampler import DeviceSampler, DeviceTokens
from .warm_up import warm_up


class DeviceRunner:
    """One model on one device. Used by one thread."""

    def __init__(
        self,
        device: Device,
        model: Model,
        cache: KVCache,
        kernels: TritonKernels,
        *,
        max_batch_size: int,
        max_model_len: int,
    ) -> None:
        self.runs_ahead = device.runs_ahead
        self._device = device
        self._model = model
        self._cache = cache
        self._inputs = InputBuilder(cache.layout.block_size, max_model_len)
        self._sampler = DeviceSampler(device, model.config.vocab_size)
        self._prompts = PromptLogprobs(model)
        self._drawn = DrawnTokens(device, max_batch_size)
        self._graphs = DecodeGraphs(
            device,
            model,
            cache,
            kernels,
            self._drawn,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
        )
        if device.runs_ahead:  # a kernel that is compiled later delays the requests of that moment
            warm_up(device, model, cache, max_model_len)

    @torch.inference_mode()
    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched:
        """See `batch.Runner`."""
        if batch.copies:
            self._cache.copy_blocks(batch.copies)
        if on_layer is None and self._graphs.takes(batch):
            logits = self._graphs.run(batch)
        else:
            logits = self._run_eagerly(batch, on_layer)
        sampled, rows = [chunk for chunk in batch.chunks if chunk.choices], None
        if before_sampling is not None:
            before_sampling()
            rows = [row for row, chunk in enumerate(sampled) if chunk.sequence.may_sample]
            sampled = [sampled[row] for row in rows]
        tokens = self._sampler.sample(logits, self._sampler.prepare(sampled, rows))
        self._drawn.keep(sampled, tokens.token_ids)
        return _Step(batch, sampled, tokens, self._prompts)

    def _run_eagerly(self, batch: Batch, on_layer: Callable[[int], None] | None) -> torch.Tensor:
        """Returns logits of the sampled rows. Attention is planned on the host, so the batch's lengths stay
        there."""
        inputs = self._on_device(self._inputs.build(batch), batch)
        hidden = self._model.forward(inputs, self._cache, on_layer)
        if inputs.needs_all_rows:
            self._prompts.add(batch.chunks, hidden)
            hidden = hidden if inputs.sampled is None else hidden[inputs.sampled.rows]
        return self._model.logits(hidden)

    def _on_device(self, inputs: ModelInput, batch: Batch) -> ModelInput:
        attention = replace(inputs.attention, slot_mapping=self._there(inputs.attention.slot_mapping))
        sampled = inputs.sampled and replace(inputs.sampled, rows=self._there(inputs.sampled.rows))
        token_ids = self._there(inputs.token_ids)
        places = self._places(batch)
        if places is not None:
            token_ids = self._drawn.take(places, token_ids)
        return replace(
            inputs,
            token_ids=token_ids,
            positions=self._there(inputs.positions),
            attention=attention,
            sampled=sampled,
        )

    def _places(self, batch: Batch) -> torch.Tensor | None:
        """Returns the place of each token of the batch among the recently drawn ones; None where the host
        knows all."""
        if not any(chunk.sequence.num_pending_tokens for chunk in batch.chunks):
            return None
        places: list[int] = []
        for chunk in batch.chunks:
            seq = chunk.sequence
            places += [KNOWN] * chunk.num_tokens
            if seq.num_pending_tokens:
                places[-1] = self._drawn.place_of(seq)
        return self._there(torch.tensor(places))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queues a copy to the device, without a wait on the host."""
        return to_device(tensor, self._device.torch_device)


class _Step:
    """A step under way."""

    def __init__(
        self, batch: Batch, sampled: list[ScheduledChunk], tokens: DeviceTokens, prompts: PromptLogprobs
    ) -> None:
        self._batch = batch
        self._sampled = sampled
        self._tokens = tokens
        self._prompts = prompts

    def collect(self) -> list[list[SampledToken]]:
        """See `batch.Launched`."""
        reported = self._tokens.report()
        if len(self._sampled) == len(self._batch.chunks) and self._prompts.is_empty:
            return reported  # of all chunks, in their order
        drawn = dict(zip(map(id, self._sampled), reported, strict=True))
        return [self._prompts.complete(chunk, drawn.get(id(chunk), [])) for chunk in self._batch.chunks]
