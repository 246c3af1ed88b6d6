"""GGUF files: the same model as the Hugging Face checkpoint that they were made from, down to its tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve.core.errors import CheckpointError
from pdserve.engine.checkpoint import Checkpoint, fingerprint, open_checkpoint
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.rope import inverse_frequencies
from pdserve.engine.tensor_reader import TensorReader
from tests.checkpoints import DEFAULTS, reference_model, small_checkpoint
from tests.engine.driver import make_sequence, random_prompt, run_to_end
from tests.engine.greedy import assert_equal, generate_greedily
from tests.gguf_files import write_gguf

PLAIN = (
    "llama-gqa",
    "llama-tied",
    "llama-all-biases-tied",
    "llama-odd-head-count",
    "mistral",
    "qwen2",
    "qwen3",
)
SCALED = ("llama-linear-rope", "llama3-rope", "llama-yarn-rope")
Q = GGMLQuantizationType


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint, torch.float32)
    return {name: reader(name, info.shape) for name, info in checkpoint.tensors.items()}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DEFAULTS))


@pytest.mark.parametrize("name", [*PLAIN, *SCALED])
def test_a_file_holds_the_model_that_it_was_made_from(tmp_path: Path, name: str) -> None:
    path = small_checkpoint(tmp_path, name)
    reference = reference_model(path)
    of_directory = open_checkpoint(path)
    of_file = open_checkpoint(write_gguf(tmp_path / "model.gguf", reference))
    same = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "tie_word_embeddings")
    for field in (*same, "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "max_position_embeddings"):
        assert getattr(of_file.config, field) == getattr(of_directory.config, field), field
    expected = read_all(of_directory)
    found = read_all(of_file)
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(found[tensor], expected[tensor]), tensor
    rope, head_dim = of_directory.config.rope, of_directory.config.head_dim
    torch.testing.assert_close(
        inverse_frequencies(of_file.config.rope, head_dim), inverse_frequencies(rope, head_dim)
    )


@pytest.mark.parametrize("name", ["llama-gqa", "llama3-rope", "qwen3"])
def test_its_greedy_tokens_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    reference = reference_model(small_checkpoint(tmp_path, name))
    engine = Engine.open(
        write_gguf(tmp_path / "model.gguf", reference), EngineOptions(dtype="float32", num_blocks=64)
    )
    prompt = tuple(random_prompt(engine.config.vocab_size, 60, 1))
    output = run_to_end(engine, [make_sequence(engine, prompt, max_tokens=8)])[0]
    assert_equal(output, generate_greedily(reference, prompt, 8))


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q8_0, Q.F16, Q.BF16])
def test_blocks_become_the_numbers_that_the_gguf_package_computes(
    tmp_path: Path, model: Any, kind: GGMLQuantizationType
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, kind))
    values = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    expected = torch.from_numpy(quants.dequantize(quants.quantize(values, kind), kind))
    assert torch.equal(read_all(checkpoint)["model.layers.1.mlp.down_proj.weight"], expected)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Q.F32, "float32"), (Q.F16, "float16"), (Q.BF16, "bfloat16"), (Q.Q8_0, "float32")]
)
def test_the_dtype_of_a_file_holds_its_values_exactly(
    tmp_path: Path, model: Any, kind: GGMLQuantizationType, dtype: str
) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "model.gguf", model, kind)).dtype == dtype


def test_slices_of_rows_make_up_the_tensor(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, Q.Q8_0))
    whole = read_all(checkpoint)
    monkeypatch.setattr("pdserve.engine.gguf_tensors.SLICE_ELEMENTS", 500)
    for name, tensor in read_all(checkpoint).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count: got 8, which is not supported; expected nothing or 0"),
        ({"attention__sliding_window": 4096}, r"llama\.attention\.sliding_window: got 4096"),
        ({"rope__dimension_count": 8}, r"llama\.rope\.dimension_count: got 8.* expected nothing or 16"),
        ({"rope__scaling__type": "longrope"}, r"llama\.rope\.scaling\.type: got 'longrope'"),
    ],
)
def test_features_that_the_model_cannot_compute_are_refused_by_key(
    tmp_path: Path, model: Any, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", model, **metadata))


def test_a_truncated_file_is_refused_when_it_is_opened(tmp_path: Path, model: Any) -> None:
    file = write_gguf(tmp_path / "model.gguf", model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="it is truncated"):
        open_checkpoint(file)


def test_a_file_changed_after_it_was_opened_is_refused(tmp_path: Path, model: Any) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model))
    write_gguf(tmp_path / "model.gguf", model, Q.F16)
    with pytest.raises(CheckpointError, match=r"replaced or written to|cannot be read"):
        read_all(checkpoint)


def test_fingerprints_tell_files_apart(tmp_path: Path, model: Any) -> None:
    one = fingerprint(write_gguf(tmp_path / "one.gguf", model))
    (tmp_path / "copy").mkdir()
    assert fingerprint(write_gguf(tmp_path / "copy" / "one.gguf", model)) == one
    assert fingerprint(write_gguf(tmp_path / "copy" / "one.gguf", model, rope__scaling__type="none")) != one
    model.model.embed_tokens.weight.data[0, 0] += 1.0
    assert fingerprint(write_gguf(tmp_path / "copy" / "one.gguf", model)) != one


def test_a_directory_of_gguf_files_names_one(tmp_path: Path, model: Any) -> None:
    (tmp_path / "config.json").write_text(
        (small_checkpoint(tmp_path, "llama-gqa") / "config.json").read_text()
    )
    file = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(CheckpointError, match=f"such as {file}"):
        open_checkpoint(tmp_path)


def test_a_name_of_the_hub_is_recognised() -> None:
    with pytest.raises(CheckpointError, match=r"hf download Qwen/Qwen3-0\.6B --local-dir Qwen3-0\.6B"):
        open_checkpoint(Path("Qwen/Qwen3-0.6B"))
