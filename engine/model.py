"""The decoder: takes the flattened tokens of many sequences and returns the final states of the sampled ones,
and their logits; writes the KV of all tokens to the paged cache.

One definition for Llama, Mistral, Qwen2 and Qwen3: `ModelConfig` states which biases, norms and windows a
checkpoint has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import AttentionBatch, Kernels, PackedLinear
from .kv_cache import KVCache
from .model_config import ModelConfig
from .parallel.collectives import ONE_RANK, Collectives
from .rope import rope_table
from .weights import LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a batch that need logits, each the last one of its sequence, and their own attention
    batch."""

    rows: torch.Tensor  # int64 [R]
    attention: AttentionBatch | None  # None: R is 0


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step's tokens, sequence after sequence."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    attention: AttentionBatch
    sampled: SampledRows | None  # None: every row is sampled
    needs_all_rows: bool = False  # final states of rows that are not sampled are needed too


class Model:
    """Packed weights, and the forward pass over them. With several ranks, all make the same calls."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kernels: Kernels,
        max_model_len: int,
        ranks: Collectives = ONE_RANK,
    ) -> None:
        """`config` is the whole model's, `weights` are this rank's share of it."""
        self.config = config
        self._ranks = ranks
        self._weights = weights
        self._kernels = kernels
        self._cos_sin = rope_table(config.rope, config.head_dim, max_model_len).to(weights.norm.device)
        layers = weights.layers
        # After layer i comes the input norm of layer i + 1, after the last one the final norm.
        self._next_norms = [*(layer.input_norm for layer in layers[1:]), weights.norm]
        shard = ranks.shard
        self._own_tokens = shard.vocabulary(config.vocab_size)
        self._vocabulary = [len(other.vocabulary(config.vocab_size)) for other in shard.all()]  # of each rank

    def forward(
        self, inputs: ModelInput, cache: KVCache, on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Returns final states [R, H] of the sampled rows, or of all; the KV of all tokens is in `cache`
        afterwards.

        `on_layer(i)` is called as soon as layer i's KV is final. Beyond its KV, the last layer computes only
        the requested rows."""
        kernels, weights, eps = self._kernels, self._weights, self.config.rms_norm_eps
        residual = self._embed(inputs.token_ids)  # [T, H]
        hidden = kernels.rms_norm(residual, weights.layers[0].input_norm, eps)
        attention = inputs.attention
        wanted = None if inputs.needs_all_rows else inputs.sampled
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            queries = self._write_kv(index, layer, hidden, inputs, cache)  # [T, Hq, D]
            if on_layer is not None:
                on_layer(index)
            if index == last and wanted is not None:
                if wanted.attention is None:
                    return residual[:0]
                queries, residual = queries[wanted.rows], residual[wanted.rows]
                attention = wanted.attention
            hidden = self._attend(index, layer, queries, attention, cache)
            hidden = kernels.add_rms_norm(hidden, residual, layer.post_attention_norm, eps)
            hidden = kernels.add_rms_norm(self._mlp(layer, hidden), residual, self._next_norms[index], eps)
        return hidden

    @property
    def head(self) -> PackedLinear:
        """Computes logits from final states."""
        return self._weights.head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns float32 [R, V] for final states [R, H]; on ranks > 0 the logits of their own tokens."""
        if not len(hidden):
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        logits = self._kernels.linear(hidden, self._weights.head, torch.float32)
        return self._ranks.gather(logits, self._vocabulary)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedding = self._weights.embedding
        if self._own_tokens == range(self.config.vocab_size):
            return embedding[token_ids]
        rows = token_ids - self._own_tokens.start
        elsewhere = (rows < 0) | (rows >= len(self._own_tokens))
        own = embedding[rows.masked_fill_(elsewhere, 0)].masked_fill_(elsewhere[:, None], 0)
        return self._ranks.all_reduce(own)  # exact: all but one are zero

    def _write_kv(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, inputs: ModelInput, cache: KVCache
    ) -> torch.Tensor:
        return self._kernels.rope_and_cache(
            self._kernels.linear(hidden, layer.qkv),
            inputs.positions,
            self._cos_sin,
            layer.q_norm,
            layer.k_norm,
            self.config.rms_norm_eps,
            *cache.layer(index),
            inputs.attention.slot_mapping,
        )

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        queries: torch.Tensor,
        attention: AttentionBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        config = self.config
        out = self._kernels.paged_attention(
            queries, *cache.layer(index), attention, config.head_dim**-0.5, config.sliding_windows[index]
        )
        return self._ranks.all_reduce(self._kernels.linear(out, layer.output))

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        if self.config.mlp_bias:
            gate, up = self._kernels.linear(hidden, layer.gate_up).chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = self._kernels.gated_linear(hidden, layer.gate_up)
        return self._ranks.all_reduce(self._kernels.linear(inner, layer.down))
