"""Small random checkpoints in Hugging Face format, one for every feature of the model definition.

Weights are drawn so that every feature matters (no zero biases, no norm of ones) and so that the largest
logit stands well clear of the second: greedy tokens are then a fair comparison between two implementations.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
DEFAULTS: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Variant:
    """One checkpoint: a family, what differs from DEFAULTS, and how it is stored."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # type of the stored weights
    num_shards: int = 1
    eos_token_ids: tuple[int, ...] = ()  # stated in generation_config.json


def _variant(
    family: str,
    *,
    dtype: str = "float32",
    num_shards: int = 1,
    eos_token_ids: tuple[int, ...] = (),
    **options: Any,
) -> Variant:
    return Variant(family, options, dtype, num_shards, eos_token_ids)


SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 24}
VARIANTS: dict[str, Variant] = {
    "llama-gqa": _variant("llama"),
    "llama-mha": _variant("llama", num_key_value_heads=4),
    "llama-mqa": _variant("llama", num_key_value_heads=1),
    "llama-one-head": _variant("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=64),
    "llama-tied": _variant("llama", tie_word_embeddings=True),
    "llama-wide-heads": _variant("llama", head_dim=32),
    "llama-narrow-heads": _variant("llama", head_dim=8),
    "llama-odd-head-count": _variant(
        "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=24
    ),
    "llama-attention-bias": _variant("llama", attention_bias=True),
    "llama-mlp-bias": _variant("llama", mlp_bias=True),
    "llama-all-biases-tied": _variant("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-linear-rope": _variant("llama", rope_parameters=LINEAR),
    "llama3-rope": _variant("llama", rope_parameters=LLAMA3),
    "llama3-rope-tied-bf16": _variant(
        "llama", rope_parameters=LLAMA3, tie_word_embeddings=True, dtype="bfloat16"
    ),
    "llama-yarn-rope": _variant("llama", rope_parameters=YARN),
    "llama-yarn-attention-factor": _variant("llama", rope_parameters={**YARN, "attention_factor": 1.25}),
    "llama-high-theta": _variant("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama-large-eps": _variant("llama", rms_norm_eps=1e-2),
    "llama-four-layers": _variant("llama", num_hidden_layers=4, hidden_size=32, head_dim=8),
    "llama-one-layer": _variant("llama", num_hidden_layers=1),
    "llama-wide": _variant(
        "llama", hidden_size=128, intermediate_size=344, num_attention_heads=8, vocab_size=1000
    ),
    "llama-sharded": _variant("llama", num_shards=3),
    "llama-sharded-fp16": _variant("llama", num_shards=3, dtype="float16"),
    "llama-bf16": _variant("llama", dtype="bfloat16"),
    "llama-several-eos": _variant("llama", eos_token_ids=(7, 11, 42)),
    "mistral": _variant("mistral", sliding_window=None),
    "mistral-sliding-16": _variant("mistral", sliding_window=16),
    "mistral-sliding-100-mha": _variant("mistral", sliding_window=100, num_key_value_heads=4),
    "mistral-sliding-bf16": _variant("mistral", sliding_window=33, dtype="bfloat16"),
    "mistral-wide-heads": _variant("mistral", head_dim=32, sliding_window=None, num_shards=2),
    "qwen2": _variant("qwen2"),
    "qwen2-tied": _variant("qwen2", tie_word_embeddings=True),
    "qwen2-sliding-upper-layers": _variant("qwen2", num_hidden_layers=4, max_window_layers=2, **SLIDING),
    "qwen2-sliding-all": _variant("qwen2", max_window_layers=0, **SLIDING),
    "qwen2-window-not-used": _variant("qwen2", use_sliding_window=False, sliding_window=8),
    "qwen2-yarn-rope": _variant("qwen2", rope_parameters=YARN, num_attention_heads=8, num_key_value_heads=2),
    "qwen2-fp16": _variant("qwen2", dtype="float16", tie_word_embeddings=True),
    "qwen3": _variant("qwen3"),
    "qwen3-tied-wide-heads": _variant("qwen3", tie_word_embeddings=True, head_dim=32),
    "qwen3-bias": _variant("qwen3", attention_bias=True),
    "qwen3-sliding-mixed": _variant("qwen3", num_hidden_layers=3, max_window_layers=1, **SLIDING),
    "qwen3-yarn-bf16": _variant("qwen3", rope_parameters=YARN, dtype="bfloat16", num_shards=2),
}


def small_checkpoint(directory: Path, name: str, seed: int = 0) -> Path:
    """Writes the checkpoint `VARIANTS[name]` below `directory`; returns its path. Equal arguments give equal
    weights."""
    variant = VARIANTS[name]
    options = DEFAULTS | variant.options
    if "head_dim" not in variant.options and variant.family == "qwen2":
        options.pop("head_dim")  # its configuration has none
    model = AutoModelForCausalLM.from_config(CONFIGS[variant.family](**options), dtype=torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed + sum(name.encode())))
    model.generation_config = GenerationConfig(eos_token_id=list(variant.eos_token_ids) or None)
    model = model.to(getattr(torch, variant.dtype))
    path = directory / name
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(path, max_shard_size=num_bytes // variant.num_shards + num_bytes // 10)
    return path


def reference_model(path: Path) -> Any:
    """The same checkpoint as transformers computes it, in float32, not stopping at any token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _draw_weights(model: Any, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1.0 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(0.4 * noise)
        else:
            gain = 4.0 if "lm_head" in name else 2.0 if "q_proj" in name or "k_proj" in name else 1.3
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * noise)
