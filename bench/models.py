"""Random checkpoints of the two shapes that the benchmark measures, in Hugging Face format.

Speed does not depend on the weights' values, so they are drawn from a seed instead of being downloaded; every
engine loads the same folder. There is no tokenizer: the benchmark speaks in token ids."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ShapeSpec:
    """The sizes of a decoder-only transformer; embeddings are tied to the output layer."""

    name: str
    family: Literal["llama", "qwen2"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        kv_size = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        bias = self.hidden_size + 2 * kv_size if self.family == "qwen2" else 0
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        layers = self.num_layers * (attention + bias + mlp + norms)
        return layers + self.hidden_size + self.vocab_size * self.hidden_size


# The shape of "stories110M", the classic of the Llama family at this size: 109.5M parameters.
LLAMA_110M = ShapeSpec(
    name="llama-110m",
    family="llama",
    num_layers=12,
    hidden_size=768,
    num_heads=12,
    num_kv_heads=12,
    intermediate_size=2048,
    vocab_size=32_000,
    max_position_embeddings=2048,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
)

# Qwen2.5-0.5B: 494M parameters.
QWEN2_500M = ShapeSpec(
    name="qwen2-0.5b",
    family="qwen2",
    num_layers=24,
    hidden_size=896,
    num_heads=14,
    num_kv_heads=2,
    intermediate_size=4864,
    vocab_size=151_936,
    max_position_embeddings=32_768,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
)

SHAPES = {spec.name: spec for spec in (LLAMA_110M, QWEN2_500M)}


def ensure_checkpoint(spec: ShapeSpec, dtype: Dtype, folder: Path, seed: int = 0) -> Path:
    """Make the checkpoint in `folder` unless it is already there. The bf16 weights are the fp32 ones,
    rounded."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "checkpoint"
        _random_model(spec, seed).to(getattr(torch, dtype)).save_pretrained(made)
        os.rename(made, folder)  # a half-written checkpoint never carries the final name
    return folder


def _random_model(spec: ShapeSpec, seed: int) -> PreTrainedModel:
    sizes = {
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.family == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
