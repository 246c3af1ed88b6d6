import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.core.errors import CheckpointError
from pdserve.engine.checkpoint import (
    Checkpoint,
    described_checkpoint,
    fingerprint,
    open_checkpoint,
    resolve_model_path,
)
from pdserve.engine.tensor_names import expected_tensors
from pdserve.engine.tensor_reader import TensorReader

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, **SHAPE}


def write(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Writes a random checkpoint of the shape above."""
    from pdserve.engine.model_config import parse_model_config

    path.mkdir(exist_ok=True)
    config = LLAMA | changes
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(parse_model_config(config))
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edit(path: Path, remove: str = "", **add: torch.Tensor) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop(remove, None)
    save_file(
        tensors | {name.replace("__", "."): tensor for name, tensor in add.items()},
        path / "model.safetensors",
    )


def shard(path: Path) -> list[Path]:
    """Splits the single file of `path` in two, as transformers does."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = [f"model-{part}-of-2.safetensors" for part in (1, 2)]
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()
    return [path / file for file in files]


def read_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint, dtype)
    return {name: reader(name, shape) for name, shape in expected_tensors(checkpoint.config).items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_checkpoints_saved_by_transformers_are_opened_and_read(
    tmp_path: Path, family: str, tied: bool, max_shard_size: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SHAPE, tie_word_embeddings=tied, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "10GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_parameters == model.num_parameters()
    assert checkpoint.dtype == "float32"
    weights = model.state_dict()
    for name, tensor in read_all(checkpoint).items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_have_the_requested_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "model", dtype=dtype))
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in read_all(checkpoint, torch.bfloat16).values()} == {torch.bfloat16}


def test_config_json_decides_the_dtype_if_stated(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / "model", torch_dtype="bfloat16")).dtype == "bfloat16"


def test_a_tensor_outlives_its_file(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    before = read_all(checkpoint)
    (path / "model.safetensors").write_bytes(bytes((path / "model.safetensors").stat().st_size))
    assert all(bool(tensor.any()) for tensor in before.values())


def test_an_existing_head_is_used_though_the_config_ties_it(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert open_checkpoint(path).config.tie_word_embeddings is False


def test_generation_config_replaces_the_end_tokens(path: Path) -> None:
    assert open_checkpoint(path).config.eos_token_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_checkpoint(path).config.eos_token_ids == (5, 6)


def test_old_rotary_buffers_are_ignored(path: Path) -> None:
    edit(path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert not any("inv_freq" in name for name in open_checkpoint(path).tensors)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    assert (
        "no such file or directory; expected a checkpoint directory, a GGUF file, or 'embedded'"
        in refusal(tmp_path / "nothing")
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", b"{", "config.json: not valid JSON"),
        ("config.json", b"\xff\xfe{}", "config.json: not valid JSON"),
        ("config.json", b"[1]", "config.json: expected a JSON object"),
        ("generation_config.json", b"{", "generation_config.json: not valid JSON"),
        (
            "model.safetensors",
            None,
            "has no weights, expected model.safetensors or model.safetensors.index.json",
        ),
        ("model.safetensors", b"", "truncated or not a safetensors file"),
        ("model.safetensors", b"x" * 5000, "truncated or not a safetensors file"),
        (
            "model.safetensors",
            (4).to_bytes(8, "little") + b"\xff" * 4,
            "corrupt: its header is not one of safetensors",
        ),
        (
            "model.safetensors",
            (2).to_bytes(8, "little") + b"{}",
            "tensor model.embed_tokens.weight of shape (64, 32)",
        ),
    ],
)
def test_a_missing_or_broken_file_is_reported(
    path: Path, file: str, content: bytes | None, message: str
) -> None:
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_reported(path: Path, kept: float) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: int(len(data) * kept)])
    assert "truncated" in refusal(path)


def test_pickled_weights_are_refused_with_conversion_advice(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "only pickled weights" in refusal(path)
    assert "save_pretrained" in refusal(path)


def test_a_missing_tensor_is_named(path: Path) -> None:
    edit(path, remove="model.layers.1.mlp.up_proj.weight")
    assert "tensor model.layers.1.mlp.up_proj.weight of shape (48, 32) is missing" in refusal(path)


def test_a_tensor_of_another_shape_is_named_with_both(path: Path) -> None:
    edit(path, model__norm__weight=torch.zeros(31))
    assert "tensor model.norm.weight has shape (31,), config.json implies (32,)" in refusal(path)


def test_an_unused_tensor_is_named(path: Path) -> None:
    edit(path, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    assert "tensor model.layers.0.self_attn.q_proj.bias is unexpected" in refusal(path)


def test_quantised_tensors_are_refused(path: Path) -> None:
    edit(path, model__norm__weight=torch.zeros(32, dtype=torch.int8))
    assert "tensor model.norm.weight is of dtype I8, supported are F32, BF16, F16" in refusal(path)


def test_a_missing_shard_is_named(path: Path) -> None:
    first, _ = shard(path)
    open_checkpoint(path)
    first.unlink()
    assert refusal(path) == f"{first}: no such file"


def test_a_shard_without_its_tensor_is_named(path: Path) -> None:
    first, second = shard(path)
    shutil.copy(second, first)
    assert f"{first}: tensor " in refusal(path)
    assert "is missing, the index says it is there" in refusal(path)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}]
)
def test_an_index_names_files_of_its_own_directory(path: Path, weight_map: object) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(path)


def test_a_file_that_breaks_after_opening_raises_checkpoint_error(path: Path) -> None:
    reader = TensorReader(open_checkpoint(path), torch.float32)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: replaced or written to since it was checked"
    ):
        reader("model.norm.weight", (32,))


def _swap_for_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)  # safetensors would wait for a writer


def _swap_for_copy(file: Path) -> None:
    shutil.copy(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def _swap_for_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("swap", [_swap_for_pipe, _swap_for_copy, _swap_for_link])
def test_a_file_swapped_after_opening_is_refused(path: Path, swap: Callable[[Path], None]) -> None:
    reader = TensorReader(open_checkpoint(path), torch.float32)
    swap(path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: (not a regular file|replaced or written to since)"
    ):
        reader("model.norm.weight", (32,))


def test_a_file_truncated_while_it_is_read_is_refused(path: Path) -> None:
    """The file is mapped: reading past its end would kill the process."""
    reader = TensorReader(open_checkpoint(path), torch.float32)
    assert reader("model.norm.weight", (32,)).shape == (32,)
    os.truncate(path / "model.safetensors", 4096)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: replaced or written to since it was checked"
    ):
        reader("model.norm.weight", (32,))


def test_an_open_file_is_read_even_after_its_name_is_reused(path: Path) -> None:
    reader = TensorReader(open_checkpoint(path), torch.float32)
    norm = reader("model.norm.weight", (32,))
    _swap_for_pipe(path / "model.safetensors")
    assert torch.equal(reader("model.norm.weight", (32,)), norm)


def test_the_reader_checks_name_and_shape(path: Path) -> None:
    reader = TensorReader(open_checkpoint(path), torch.float32)
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        reader("nothing", (1,))
    with pytest.raises(CheckpointError, match=r"has shape \(32,\), expected \(33,\)"):
        reader("model.norm.weight", (33,))


def test_fingerprints_distinguish_weights_but_not_places(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    prints = [
        fingerprint(one),
        fingerprint(write(tmp_path / "two", seed=1)),
        fingerprint(write(tmp_path / "three", rope_theta=5.0)),
        fingerprint(write(tmp_path / "four", dtype=torch.bfloat16)),
    ]
    assert len(set(prints)) == 4
    assert fingerprint(tmp_path / "copy") == prints[0]


def test_a_model_path_is_a_directory_or_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model_path("~/models/x") == tmp_path / "models" / "x"
    assert resolve_model_path("/m") == Path("/m")
    assert open_checkpoint(resolve_model_path("embedded")).num_parameters > 0


def test_a_config_alone_describes_the_checkpoint_that_it_belongs_to(tmp_path: Path) -> None:
    whole = open_checkpoint(write(tmp_path / "model", torch_dtype="float32"))
    described = described_checkpoint(tmp_path / "model" / "config.json")
    assert described.config == whole.config
    assert (described.num_parameters, described.dtype) == (whole.num_parameters, whole.dtype)


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        described_checkpoint(tmp_path / "config.json")
