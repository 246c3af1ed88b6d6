"""The models whose shapes are measured, and the floors under their steps: bytes that must be read, operations
that must be done. Weights are random: speed does not depend on them."""

import math
from dataclasses import dataclass
from typing import Any

from pdserve.engine.model_config import ModelConfig, parse_model_config
from pdserve.engine.tensor_names import EMBEDDING, HEAD, expected_tensors

_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Shape:
    """`options` are those of a Hugging Face config.json."""

    name: str
    options: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return parse_model_config(self.options)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.config.num_layers * self.config.kv_size * _BYTES

    def step_bytes(self, num_context_tokens: int) -> int:
        """A decode step reads every weight once (of the embedding a few rows only) and the keys and values of
        all contexts."""
        return (
            _BYTES * (self._num_layer_parameters + self._num_head_parameters)
            + num_context_tokens * self.kv_bytes_per_token
        )

    def prefill_flops(self, num_tokens: int) -> float:
        """The FLOPs of one prompt: every layer's products, causal attention, the head for the last token."""
        config = self.config
        products = 2.0 * self._num_layer_parameters * num_tokens
        attention = 2.0 * num_tokens**2 * config.q_size * config.num_layers
        return products + attention + 2.0 * self._num_head_parameters

    @property
    def _num_layer_parameters(self) -> int:
        tensors = expected_tensors(self.config)
        return sum(math.prod(shape) for name, shape in tensors.items() if name not in (EMBEDDING, HEAD))

    @property
    def _num_head_parameters(self) -> int:
        return self.config.vocab_size * self.config.hidden_size


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    }


def _options(architecture: str, **options: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "dtype": "bfloat16",
        "eos_token_id": None,
        "bos_token_id": None,
    } | options


LLAMA_8B = Shape(
    "Llama-3.1-8B",
    _options(
        "LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=_llama3_rope(8.0),
        tie_word_embeddings=False,
    ),
)
LLAMA_1B = Shape(
    "Llama-3.2-1B",
    _options(
        "LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True,
    ),
)
QWEN3_06B = Shape(
    "Qwen3-0.6B",
    _options(
        "Qwen3ForCausalLM",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    ),
)
TOY = Shape(
    "toy",
    _options(
        "Qwen3ForCausalLM",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
    ),
)
