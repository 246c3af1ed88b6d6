"""A checkpoint's tensors, fused and packed for the kernels, one tensor at a time so that none is held
twice."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels import Kernels, PackedLinear
from .model_config import ModelConfig

ReadTensor = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. `qkv` and `gate_up` are fused along their outputs."""

    input_norm: torch.Tensor  # [H]
    qkv: PackedLinear
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    output: PackedLinear
    post_attention_norm: torch.Tensor  # [H]
    gate_up: PackedLinear  # by pack_gate_up, or by pack_linear when the MLP has biases
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All of a model's weights, ready for the kernels."""

    embedding: torch.Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [H]
    head: PackedLinear


def load_weights(config: ModelConfig, read: ReadTensor, kernels: Kernels) -> ModelWeights:
    """`read(name, shape)` returns a tensor by its Hugging Face name, in the model's dtype and of that shape,
    or raises."""
    embedding = read("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    layers = [
        _LayerReader(config, read, kernels, f"model.layers.{index}").layer()
        for index in range(config.num_layers)
    ]
    norm = read("model.norm.weight", (config.hidden_size,))
    tied = config.tie_word_embeddings
    head = embedding if tied else read("lm_head.weight", (config.vocab_size, config.hidden_size))
    return ModelWeights(embedding, tuple(layers), norm, kernels.pack_linear(head))


class _LayerReader:
    """Reads the tensors below one prefix."""

    def __init__(self, config: ModelConfig, read: ReadTensor, kernels: Kernels, prefix: str) -> None:
        self._config = config
        self._read = read
        self._kernels = kernels
        self._prefix = prefix

    def layer(self) -> LayerWeights:
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        q_norm, k_norm = (
            self._vector(f"self_attn.{x}_norm", config.head_dim) if config.qk_norm else None for x in "qk"
        )
        return LayerWeights(
            input_norm=self._vector("input_layernorm", hidden),
            qkv=self._qkv(),
            q_norm=q_norm,
            k_norm=k_norm,
            output=self._linear("self_attn.o_proj", hidden, config.q_size, config.o_bias),
            post_attention_norm=self._vector("post_attention_layernorm", hidden),
            gate_up=self._gate_up(),
            down=self._linear("mlp.down_proj", hidden, inner, config.mlp_bias),
        )

    def _qkv(self) -> PackedLinear:
        config = self._config
        parts = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        weight = torch.cat(
            [self._weight(f"self_attn.{name}", size, config.hidden_size) for name, size in parts.items()]
        )
        if not config.qkv_bias:
            return self._kernels.pack_linear(weight)
        biases = [self._bias(f"self_attn.{name}", size) for name, size in parts.items()]
        return self._kernels.pack_linear(weight, torch.cat(biases))

    def _gate_up(self) -> PackedLinear:
        config = self._config
        names, inner = ("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size
        gate, up = (self._weight(name, inner, config.hidden_size) for name in names)
        if not config.mlp_bias:
            return self._kernels.pack_gate_up(gate, up)
        biases = [self._bias(name, inner) for name in names]
        return self._kernels.pack_linear(torch.cat((gate, up)), torch.cat(biases))

    def _linear(self, name: str, num_out: int, num_in: int, has_bias: bool) -> PackedLinear:
        bias = self._bias(name, num_out) if has_bias else None
        return self._kernels.pack_linear(self._weight(name, num_out, num_in), bias)

    def _weight(self, name: str, num_out: int, num_in: int) -> torch.Tensor:
        return self._read(f"{self._prefix}.{name}.weight", (num_out, num_in))

    def _vector(self, name: str, size: int) -> torch.Tensor:
        return self._read(f"{self._prefix}.{name}.weight", (size,))

    def _bias(self, name: str, size: int) -> torch.Tensor:
        return self._read(f"{self._prefix}.{name}.bias", (size,))
