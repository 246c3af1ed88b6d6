"""Small random checkpoints, and the tokens that `transformers` continues prompts with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar

_LEAST_GAP = 1e-3  # between the two largest logits: else tokens are left to rounding
_MAX_SEEDS = 20


@dataclass(frozen=True)
class SmallModel:
    """One case of the comparison: a checkpoint, prompts, and their greedy continuations."""

    path: Path
    prompts: list[list[int]]
    continuations: list[list[int]]


def small_model(name: str, folder: Path, is_toy: bool) -> SmallModel:
    """Written below `folder`. `name` is "llama" or "qwen3", with norms of queries and keys and windows in
    upper layers."""
    disable_progress_bar()
    config = _config(name, is_toy)
    lengths, num_new_tokens = ((1, 9, 27), 3) if is_toy else ((1, 9, 70, 200), 24)
    for seed in range(_MAX_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _draw_weights(model, generator)
        prompts = [
            torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths
        ]
        continued = [_continued(model, prompt, num_new_tokens) for prompt in prompts]
        if min(gap for _, gap in continued) > _LEAST_GAP:
            path = folder / name
            model.generation_config = GenerationConfig()
            model.save_pretrained(path)
            return SmallModel(path, prompts, [tokens for tokens, _ in continued])
    raise AssertionError(f"{name}: of {_MAX_SEEDS} seeds none has tokens that stand clear of each other")


def _config(name: str, is_toy: bool) -> Any:
    options: dict[str, Any] = {
        "vocab_size": 384 if is_toy else 4096,
        "hidden_size": 64 if is_toy else 512,
        "intermediate_size": 96 if is_toy else 1408,
        "num_hidden_layers": 2 if is_toy else 4,
        "num_attention_heads": 4 if is_toy else 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if name == "llama":
        return LlamaConfig(**options, head_dim=16 if is_toy else 64)
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    return Qwen3Config(**options, **windows, head_dim=32 if is_toy else 128)


@torch.no_grad()
def _draw_weights(model: Any, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1.0 + 0.3 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(0.4 * noise)
        else:
            gain = 4.0 if "lm_head" in name else 2.0 if "q_proj" in name or "k_proj" in name else 1.3
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * noise)


def _continued(model: Any, prompt: list[int], num_new_tokens: int) -> tuple[list[int], float]:
    """(tokens, the least gap between the two largest logits)."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())
