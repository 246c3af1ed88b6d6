"""A known model's checkpoint, and what a plan says."""

from pathlib import Path
from typing import Any

from pdserve.core.checkpoint_files import FileStamp
from pdserve.engine.checkpoint import Checkpoint
from pdserve.engine.model_config import parse_model_config
from pdserve.engine.safetensors_header import TensorInfo
from pdserve.engine.tensor_names import expected_tensors
from pdserve.planner.plan import Plan

GIB = 1 << 30
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def checkpoint(**changes: Any) -> Checkpoint:
    config = parse_model_config(LLAMA_8B | changes)
    infos = {
        name: TensorInfo(Path("f"), "BF16", shape, FileStamp(0, 0, 0, 0))
        for name, shape in expected_tensors(config).items()
    }
    return Checkpoint(Path("llama"), config, infos)


def messages(result: Plan) -> list[str]:
    return [finding.message for finding in result.findings]
