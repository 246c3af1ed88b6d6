"""A worker reads a checkpoint's tokenizer for its grammar process without trusting what is in it."""

import json
import os
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError
from pdserve.embedded import MODEL_DIR
from pdserve.grammar.vocabulary import tokenizer_json

MODEL = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


def directory(path: Path, tokenizer: object, config: object = None) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_everything_but_training_settings_is_as_in_the_file() -> None:
    original = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    del original["truncation"], original["padding"]
    assert json.loads(tokenizer_json(MODEL_DIR)) == original


def test_tokens_that_only_the_config_knows_are_added_in_order(tmp_path: Path) -> None:
    added = {"id": 2, "content": "<b>", "special": True}
    config = {
        "added_tokens_decoder": {
            "1": {"content": "<a>", "special": True, "__type": "AddedToken"},
            "2": {"content": "<c>"},
        }
    }
    tokens = json.loads(
        tokenizer_json(directory(tmp_path, {"model": MODEL, "added_tokens": [added]}, config))
    )["added_tokens"]
    assert [(token["id"], token["content"], token["special"]) for token in tokens] == [
        (1, "<a>", True),
        (2, "<b>", True),
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        [],
        {},
        {"model": MODEL, "added_tokens": 1},
        {"model": MODEL, "added_tokens": [{"id": "x"}]},
        {"model": MODEL, "added_tokens": [{"id": 10**400, "content": "a"}]},
    ],
)
def test_an_invalid_tokenizer_is_refused_with_its_file(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        tokenizer_json(directory(tmp_path, tokenizer))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_a_files_place_is_refused(tmp_path: Path, file: str) -> None:
    directory(tmp_path, {"model": MODEL}, {})
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        tokenizer_json(tmp_path)
