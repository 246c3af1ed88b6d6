import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pdserve.core.errors import CheckpointError
from pdserve.engine.model_config import ModelConfig, parse_model_config

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def parse(family: str = "Llama", **changes: Any) -> ModelConfig:
    return parse_model_config({"architectures": [f"{family}ForCausalLM"], **SHAPE} | changes)


def saved_by_transformers(path: Path, family: str, **changes: Any) -> tuple[dict[str, Any], Any]:
    config = getattr(transformers, f"{family}Config")(
        **SHAPE | changes, architectures=[f"{family}ForCausalLM"]
    )
    config.save_pretrained(path)
    return json.loads((path / "config.json").read_text()), config


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}]
)
def test_shapes_agree_with_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    saved, reference = saved_by_transformers(tmp_path, family, **changes)
    ours = parse_model_config(saved)
    assert ours.num_heads == reference.num_attention_heads
    assert ours.num_kv_heads == reference.num_key_value_heads
    assert ours.head_dim == (getattr(reference, "head_dim", None) or 8)
    assert ours.rms_norm_eps == reference.rms_norm_eps
    assert ours.max_position_embeddings == reference.max_position_embeddings
    assert ours.tie_word_embeddings == reference.tie_word_embeddings
    assert ours.rope.theta == reference.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("family", "changes", "biases"),
    [
        ("Llama", {}, (False, False, False)),
        ("Llama", {"attention_bias": True}, (True, True, False)),
        ("Llama", {"mlp_bias": True}, (False, False, True)),
        ("Mistral", {"attention_bias": True}, (False, False, False)),
        ("Qwen2", {}, (True, False, False)),
        ("Qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases_are_those_of_the_layers_in_transformers(
    family: str, changes: dict[str, Any], biases: tuple[bool, bool, bool]
) -> None:
    ours = parse(family, **changes)
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == biases
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    with torch.device("meta"):
        layer = getattr(transformers, f"{family}Model")(config).layers[0]
    linears = (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj)
    assert tuple(linear.bias is not None for linear in linears) == biases
    assert ours.qk_norm == hasattr(layer.self_attn, "q_norm")


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("Llama", {"sliding_window": 8}, (None,) * 4),
        ("Mistral", {}, (4096,) * 4),
        ("Mistral", {"sliding_window": 8}, (8,) * 4),
        ("Mistral", {"sliding_window": None}, (None,) * 4),
        ("Qwen2", {"sliding_window": 8}, (None,) * 4),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8,) * 4),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8}, (None,) * 4),
        (
            "Qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_each_layer_has_its_window(
    family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert parse(family, **changes).sliding_windows == windows


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"type": "linear", "factor": 2},
    LLAMA3,
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_both_spellings_of_rope_scaling_agree_with_transformers(
    scaling: dict[str, Any],
) -> None:
    old = parse(rope_theta=500.0, rope_scaling=scaling, max_position_embeddings=256)
    new = parse(rope_parameters={**scaling, "rope_theta": 500.0}, max_position_embeddings=256)
    assert old == new
    reference = transformers.LlamaConfig(
        **SHAPE, rope_parameters={**scaling, "rope_theta": 500.0}, max_position_embeddings=256
    )
    theirs = reference.rope_parameters
    assert (new.rope.kind, new.rope.theta) == (theirs["rope_type"], 500.0)
    if new.rope.kind in ("llama3", "yarn"):
        assert new.rope.original_max_position_embeddings == theirs["original_max_position_embeddings"]
    if new.rope.kind != "default":
        _, attention_factor = ROPE_INIT_FUNCTIONS[new.rope.kind](reference)
        assert new.rope.attention_factor == attention_factor
        assert new.rope.factor == (theirs["factor"] or 4.0)


def test_an_original_length_beside_the_rope_fields_wins() -> None:
    ours = parse(rope_scaling=LLAMA3, original_max_position_embeddings=32, max_position_embeddings=256)
    assert ours.rope.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (None, None, ()),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": 0}, (0,)),
        (2, {}, ()),
    ],
)
def test_end_tokens_come_from_an_existing_generation_config(
    eos: object, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SHAPE, "eos_token_id": eos}
    assert parse_model_config(config, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            (
                "architecture 'MambaForCausalLM' is not supported; supported are LlamaForCausalLM,"
                " MistralForCausalLM, "
            ),
        ),
        ({"architectures": None}, "architectures is missing, expected a list of one of LlamaForCausalLM"),
        ({"architectures": []}, "architectures: got []"),
        ({"architectures": [{}]}, "architecture {} is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq) is not supported"),
        ({"quantization_config": {}}, "quantization_config (of an unnamed method) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"torch_dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"vocab_size": None}, "vocab_size is missing, expected a positive integer"),
        ({"vocab_size": "64"}, "vocab_size: got '64', expected"),
        ({"vocab_size": True}, "vocab_size: got True, expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is not supported"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0, expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id: got [1, 'x'], expected an integer or a list of integers"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope type 'dynamic' is not supported; supported are default",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"rope_parameters": {"full_attention": {}}}, "rope parameters per layer type are not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear', expected a mapping"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing, expected a positive number"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "must be greater than low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor below 1 is not supported"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize("layer_types", [["full_attention"], ["chunked_attention"] * 4, "full", [[]] * 4])
def test_unknown_layer_types_are_refused(layer_types: object) -> None:
    with pytest.raises(CheckpointError, match="expected 4 of 'full_attention' or 'sliding_attention'"):
        parse("Qwen3", layer_types=layer_types)


def test_sliding_layers_without_a_window_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no sliding window is in use"):
        parse("Qwen3", layer_types=["sliding_attention"] * 4)
