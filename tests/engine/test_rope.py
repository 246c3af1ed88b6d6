"""Rope tables against transformers' own, for every kind of scaling we serve."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pdserve.engine.rope import rope_table
from pdserve.engine.rope_config import parse_rope
from tests.checkpoints import LINEAR, LLAMA3, YARN

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "high theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with attention factor": {**YARN, "attention_factor": 1.25},
    "yarn with betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, short original context": {**YARN, "original_max_position_embeddings": 64, "factor": 64.0},
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", PARAMETERS)
def test_cosines_and_sines_equal_those_of_transformers(name: str, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=dict(PARAMETERS[name]),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=-1)
    table = rope_table(parse_rope(config.to_dict(), 4096, "config.json"), head_dim, 4096)
    assert table.dtype == torch.float32
    # Some frequencies differ in their last bit; at position 4,095 that is up to 4095 * 2**-24 radians.
    torch.testing.assert_close(table, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(table[:64], expected[:64], rtol=0, atol=1e-5)
