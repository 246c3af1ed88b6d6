"""A GGUF file's metadata as the fields of a config.json, checked by `engine.model_config` like any other."""

from typing import Any

from ..core.checkpoint_files import shown
from ..core.errors import CheckpointError
from ..core.gguf_file import GgufHeader

_ARCHITECTURES = {  # ggml's names, in which Mistral's models are of the Llama kind
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def config_values(header: GgufHeader) -> dict[str, Any]:
    """Returns the config.json that describes the same model. Raises CheckpointError for features that our
    model definition cannot compute."""
    return _Metadata(header).config()


class _Metadata:
    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._values = header.metadata
        architecture = self._values.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            supported = ", ".join(_ARCHITECTURES)
            raise CheckpointError(
                f"{header.file}: general.architecture: {shown(architecture)} is not supported; supported are"
                f" {supported}"
            )
        self._architecture = str(architecture)

    def config(self) -> dict[str, Any]:
        self._refuse_unsupported()
        config: dict[str, Any] = {"architectures": [_ARCHITECTURES[self._architecture]]}
        config |= {name: value for key, name in _FIELDS.items() if (value := self._get(key)) is not None}
        embedding = self._header.tensors.get(_EMBEDDING)
        if embedding is None:
            raise CheckpointError(f"{self._header.file}: tensor {_EMBEDDING} is missing")
        config["vocab_size"] = embedding.shape[0]
        config["tie_word_embeddings"] = _HEAD not in self._header.tensors
        config["attention_bias"] = "blk.0.attn_output.bias" in self._header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in self._header.tensors
        ids = {name: self._values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *_ENDS)}
        config["bos_token_id"] = ids["bos"]
        config["eos_token_id"] = [ids[name] for name in _ENDS if ids[name] is not None]
        config["rope_scaling"] = self._rope_scaling()
        return config

    def _get(self, key: str) -> Any:
        return self._values.get(f"{self._architecture}.{key}")

    def _refuse_unsupported(self) -> None:
        head_dim = self._get("attention.key_length")
        if head_dim is None and isinstance(heads := self._get("attention.head_count"), int) and heads:
            head_dim = (self._get("embedding_length") or 0) // heads
        for key, supported in {
            "expert_count": (None, 0),
            "attention.sliding_window": (None, 0),
            "attention.value_length": (None, head_dim),
            "rope.dimension_count": (None, head_dim),
        }.items():
            if self._get(key) not in supported:
                expected = " or ".join("nothing" if value is None else str(value) for value in supported)
                raise self._unsupported(key, f"expected {expected}")
        if self._values.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{self._header.file}: one of {shown(self._values['split.count'])} parts, expected a whole"
                " file; join them with llama.cpp's llama-gguf-split --merge"
            )

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise self._unsupported("rope.scaling.type", "supported are none, linear and yarn")
        fields = {
            "factor": self._get("rope.scaling.factor"),
            "original_max_position_embeddings": self._get("rope.scaling.original_context_length"),
        }
        if self._get("rope.scaling.attn_factor") not in (None, 1.0):
            raise self._unsupported("rope.scaling.attn_factor", "expected 1")
        return {"rope_type": kind} | {name: value for name, value in fields.items() if value is not None}

    def _unsupported(self, key: str, expected: str) -> CheckpointError:
        got = shown(self._get(key))
        return CheckpointError(
            f"{self._header.file}: {self._architecture}.{key}: got {got}, which is not supported; {expected}"
        )
