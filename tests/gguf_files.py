"""GGUF files as llama.cpp's converter writes them, from a model of transformers and a tokenizer.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    file: Path,
    model: Any,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: Path | None = None,
    **metadata: Any,
) -> Path:
    """Writes the weights of `model` in `kind`, vectors in F32, and the tokenizer and chat template of a
    checkpoint's directory. `metadata` adds keys of the architecture, in which __ stands for a dot."""
    config = model.config
    writer = GGUFWriter(str(file), ARCHITECTURES[config.model_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for name, value in metadata.items():
        key = f"{ARCHITECTURES[config.model_type]}.{name.replace('__', '.')}"
        add: dict[type, Callable[[str, Any], None]]
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    if tokenizer is not None:
        eos = config.eos_token_id
        ids = {"eos": eos[0], "eot": eos[-1]} if isinstance(eos, list) else {"eos": eos}
        add_tokenizer(writer, (tokenizer / "tokenizer.json").read_text(), "default", **ids)
        template = json.loads((tokenizer / "tokenizer_config.json").read_text())["chat_template"]
        writer.add_chat_template(template)
    _add_rope(writer, config, head_dim)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, name, tensor, kind, config)
    _close(writer)
    return file


def _add_rope(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    """Adds the scaling's keys; Llama 3's scaling is stored as a tensor of divisors."""
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    elif rope["rope_type"] != "default":
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tensor(
    writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType, config: Any
) -> None:
    values = tensor.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    leaf = name.split(".")[-2]
    if ARCHITECTURES[config.model_type] == "llama" and leaf in heads:
        halves = values.reshape(heads[leaf], 2, -1, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    stem, part = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        stem = f"blk.{layer}.{NAMES[stem]}"
    else:
        stem = NAMES[stem]
    if values.ndim == 1 or kind is GGMLQuantizationType.F32:
        writer.add_tensor(f"{stem}.{part}", np.ascontiguousarray(values, dtype=np.float32))
    else:
        writer.add_tensor(f"{stem}.{part}", quants.quantize(values, kind), raw_dtype=kind)


def add_tokenizer(writer: GGUFWriter, tokenizer_json: str, pre: str, **ids: int) -> None:
    """Adds a byte-level tokenizer."""
    parts = json.loads(tokenizer_json)
    vocab = parts["model"]["vocab"] | {token["content"]: token["id"] for token in parts["added_tokens"]}
    special = {token["id"] for token in parts["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if token_id in special else 1 for token_id in sorted(vocab.values())])
    writer.add_token_merges([" ".join(merge) for merge in parts["model"]["merges"]])
    for name, token_id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)


def write_metadata(file: Path, **values: Any) -> Path:
    """Writes a file without tensors; __ in a key stands for a dot."""
    writer = GGUFWriter(str(file), "llama")
    for name, value in values.items():
        writer.add_key_value(name.replace("__", "."), value, *_types(value))
    _close(writer)
    return file


def _types(value: Any) -> tuple[Any, Any]:
    from gguf import GGUFValueType

    kind = GGUFValueType.get_type(value)
    return kind, GGUFValueType.get_type(value[0]) if kind is GGUFValueType.ARRAY else None


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
