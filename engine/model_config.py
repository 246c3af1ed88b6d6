"""A model's shape and options, read from the config.json of a Hugging Face checkpoint.

Takes the parsed JSON and returns one frozen `ModelConfig`, which drives the model definition, KV layout and
`plan`. Features that our model definition cannot compute exactly are refused here, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.checkpoint_files import shown, shown_text
from ..core.errors import CheckpointError
from .json_fields import JsonFields
from .rope_config import RopeConfig, parse_rope

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 1024  # the largest models have some 130; windows, names and shapes are listed for each
MAX_POSITIONS = 1 << 24  # up to here the rope's table counts exactly in float32


@dataclass(frozen=True)
class _Family:
    """The defaults of an architecture's config class where config.json is silent."""

    max_position_embeddings: int
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_heads


_FAMILIES = {
    "LlamaForCausalLM": _Family(max_position_embeddings=2048, num_kv_heads=None),
    "MistralForCausalLM": _Family(max_position_embeddings=131072, num_kv_heads=8),
    "Qwen2ForCausalLM": _Family(max_position_embeddings=32768, num_kv_heads=32),
    "Qwen3ForCausalLM": _Family(max_position_embeddings=32768, num_kv_heads=32, head_dim=128),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama kind: pre-norm, rotary positions, grouped-query attention, gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before the rotation
    sliding_windows: tuple[
        int | None, ...
    ]  # per layer: a query sees itself and the window - 1 keys before it; None: all
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str | None  # the weights' dtype by config.json; None: not stated

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def parse_model_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, source: str = "config.json"
) -> ModelConfig:
    """Returns the model that `config` describes. Raises CheckpointError for fields that are missing,
    malformed or unsupported.

    `generation_config` is the parsed generation_config.json where the checkpoint has one; its end tokens then
    replace those of `config`, as in transformers' `generate`."""
    fields = JsonFields(config, source)
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    family = _FAMILIES[architecture]
    num_layers = fields.positive_int("num_hidden_layers", maximum=MAX_LAYERS)
    max_position_embeddings = fields.positive_int(
        "max_position_embeddings", family.max_position_embeddings, MAX_POSITIONS
    )
    generation = (
        fields if generation_config is None else JsonFields(generation_config, "generation_config.json")
    )
    is_llama, is_qwen2, is_qwen3 = (architecture.startswith(name) for name in ("Llama", "Qwen2", "Qwen3"))
    attention_bias = (is_llama or is_qwen3) and fields.flag("attention_bias", False)
    num_heads, num_kv_heads, head_dim = _heads(fields, family)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.positive_int("vocab_size"),
        hidden_size=fields.positive_int("hidden_size"),
        intermediate_size=fields.positive_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.positive_float("rms_norm_eps", 1e-6),
        rope=parse_rope(config, max_position_embeddings, source),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=is_llama and fields.flag("mlp_bias", False),
        qk_norm=is_qwen3,
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        eos_token_ids=generation.ints("eos_token_id"),
        bos_token_id=fields.optional_int("bos_token_id"),
        dtype=_dtype(fields),
    )


def _architecture(fields: JsonFields) -> str:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    names = fields.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.refuse("architectures", f"a list of one of {supported}")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{fields.source}: architecture {shown(names[0])} is not supported; supported are {supported}"
        )
    return str(names[0])


def _refuse_unsupported(fields: JsonFields) -> None:
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        described = shown_text(method) if method and isinstance(method, str) else "of an unnamed method"
        raise CheckpointError(
            f"{fields.source}: quantization_config ({described}) is not supported; "
            f"weights must be one of {', '.join(SUPPORTED_DTYPES)}"
        )
    activation = fields.optional_str("hidden_act") or "silu"
    if activation != "silu":
        raise CheckpointError(
            f"{fields.source}: hidden_act {shown(activation)} is not supported; supported is 'silu'"
        )


def _heads(fields: JsonFields, family: _Family) -> tuple[int, int, int]:
    num_heads = fields.positive_int("num_attention_heads")
    if "num_key_value_heads" in fields.values:
        num_kv_heads = fields.optional_int("num_key_value_heads") or num_heads
    else:
        num_kv_heads = family.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{fields.source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads"
            f" {num_kv_heads}"
        )
    head_dim = (
        fields.optional_int("head_dim") or family.head_dim or fields.positive_int("hidden_size") // num_heads
    )
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"{fields.source}: head_dim {head_dim} is not supported, expected an even number"
        )
    return num_heads, num_kv_heads, head_dim


def _sliding_windows(fields: JsonFields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    in_use = architecture == "MistralForCausalLM" or fields.flag("use_sliding_window", False)
    disabled = not in_use or ("sliding_window" in fields.values and fields.values["sliding_window"] is None)
    window = None if disabled else fields.positive_int("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    return tuple(window if sliding else None for sliding in _sliding_layers(fields, num_layers, window))


def _sliding_layers(fields: JsonFields, num_layers: int, window: int | None) -> list[bool]:
    """Returns which layers of a Qwen model use a sliding window."""
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        first = fields.optional_int("max_window_layers")
        return [layer >= (28 if first is None else first) for layer in range(num_layers)]
    kinds = ("full_attention", "sliding_attention")
    known = isinstance(layer_types, list) and all(kind in kinds for kind in layer_types)
    if not known or len(layer_types) != num_layers:
        raise fields.refuse("layer_types", f"{num_layers} of 'full_attention' or 'sliding_attention'")
    if window is None and "sliding_attention" in layer_types:
        raise CheckpointError(
            f"{fields.source}: layer_types has 'sliding_attention', but no sliding window is in use"
        )
    return [kind == "sliding_attention" for kind in layer_types]


def _dtype(fields: JsonFields) -> str | None:
    name = fields.optional_str("dtype") or fields.optional_str("torch_dtype")
    if name is None or name == "auto":
        return None
    name = name.removeprefix("torch.")
    if name not in SUPPORTED_DTYPES:
        raise CheckpointError(
            f"{fields.source}: dtype {shown(name)} is not supported; supported are"
            f" {', '.join(SUPPORTED_DTYPES)}"
        )
    return name
