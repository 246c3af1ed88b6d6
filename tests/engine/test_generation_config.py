"""The sampling defaults of a checkpoint's generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.config import ModelSection
from pdserve.core.errors import CheckpointError
from pdserve.core.request import DefaultSampling
from pdserve.engine.generation_config import default_sampling


def write(path: Path, values: Any) -> ModelSection:
    (path / "generation_config.json").write_text(json.dumps(values))
    return ModelSection(path=str(path))


def test_what_the_file_states_are_the_defaults(tmp_path: Path) -> None:
    stated: dict[str, Any] = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    model = write(tmp_path, stated | {"do_sample": True, "eos_token_id": [1, 2], "max_new_tokens": 9})
    assert default_sampling(model) == DefaultSampling(**stated)
    assert default_sampling(model).stated == stated


def test_none_leaves_the_file_out(tmp_path: Path) -> None:
    model = write(tmp_path, {"temperature": 0.6, "top_p": "wrong"})
    assert default_sampling(model.model_copy(update={"generation_config": "none"})) == DefaultSampling()


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        assert default_sampling(ModelSection(path=str(path))).stated == {}


@pytest.mark.parametrize(
    "values", [{}, {"temperature": None, "top_k": None}, {"transformers_version": "5.0", "pad_token_id": 0}]
)
def test_what_the_file_leaves_out_is_left_to_the_interface(tmp_path: Path, values: dict[str, Any]) -> None:
    assert default_sampling(write(tmp_path, values)) == DefaultSampling()


def test_minus_one_of_top_k_is_off(tmp_path: Path) -> None:
    assert default_sampling(write(tmp_path, {"top_k": -1})).top_k == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature: -1.0 is not valid, expected 0 to 100"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
        ({"temperature": 1e40}, "temperature: got 1e+40, expected a number"),
        ({"top_k": 1.5}, "top_k: got 1.5, expected an integer"),
        ({"top_k": True}, "top_k: got True, expected an integer"),
        ({"top_p": 0}, "top_p: 0.0 is not valid, expected more than 0"),
        ({"min_p": 2}, "min_p: 2.0 is not valid"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0.0 is not valid"),
        ([], "expected a JSON object"),
    ],
)
def test_what_no_request_could_have_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        default_sampling(write(tmp_path, values))
    assert "generation_config.json: " in str(refused.value) and message in str(refused.value)
    assert "model.generation_config: none" in str(refused.value)


def test_the_embedded_model_has_defaults_of_its_own() -> None:
    assert default_sampling(ModelSection()).stated == {"temperature": 0.7, "top_p": 0.95}
