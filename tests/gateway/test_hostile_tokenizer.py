"""Malicious tokenizers end in a checkpoint error, and harm only the process that exists for loading them."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.checkpoint_files import MAX_TOKENIZER_BYTES
from pdserve.core.errors import CheckpointError
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.text.tokenizer_loading.messages import DEFAULT_LIMITS, Limits
from pdserve.gateway.text.tokenizer_loading.process import MAX_TEMPLATE_BYTES, load
from tests.gateway.support import (
    byte_level,
)
from tests.gateway.tokenizer_parts import doubling, sequence


def directory(path: Path, **changes: Any) -> Path:
    """Returns a checkpoint directory with a tokenizer whose JSON has `changes`."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(json.loads(byte_level().to_json()) | changes))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


def refusal(path: Path, limits: Limits = DEFAULT_LIMITS) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, limits)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1000
    return message


def test_the_server_imports_neither_transformers_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pdserve.gateway.text.tokenizer import Tokenizer;"
        f" Tokenizer.load(Path({str(MODEL_DIR)!r})); print([name for name in ('transformers', 'torch') if"
        " name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "chat_template.jinja"]
)
def test_a_pipe_or_a_device_is_refused_before_anything_starts(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    path = directory(tmp_path / "model")
    (path / file).unlink(missing_ok=True)
    (path / file).symlink_to("/dev/zero")
    assert refusal(path) == f"{path / file}: not a regular file"
    (path / file).unlink()
    os.mkfifo(path / file)
    assert refusal(path) == f"{path / file}: not a regular file"


@pytest.mark.parametrize(
    ("file", "max_bytes"),
    [("tokenizer.json", MAX_TOKENIZER_BYTES), ("additional_chat_templates/x.jinja", MAX_TEMPLATE_BYTES)],
)
def test_a_large_file_is_refused_before_anything_starts(
    tmp_path: Path, file: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    path = directory(tmp_path / "model")
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).touch()
    os.truncate(path / file, max_bytes + 1)
    assert refusal(path) == f"{path / file}: {max_bytes + 1} bytes, expected at most {max_bytes}"


def test_a_normalizer_that_grows_a_text_without_end_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", normalizer=doubling(60))
    assert (
        "its tokenizer cannot be loaded: its normalizer and pre_tokenizer can make a text 1024 times as long"
        in refusal(path)
    )


def test_an_expression_that_backtracks_without_end_is_refused(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    assert "its tokenizer cannot be loaded: it fails over the text " in refusal(
        directory(tmp_path / "model", pre_tokenizer=split)
    )


def test_a_tokenizer_that_takes_too_much_time_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    assert (
        refusal(path, Limits(load_s=0.001))
        == f"{path}: its tokenizer cannot be loaded: it takes too much time"
    )


def test_a_tokenizer_that_waits_without_work_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    assert (
        refusal(path, Limits(wall_s=0.01))
        == f"{path}: its tokenizer cannot be loaded: it takes too much time"
    )


def test_a_text_that_takes_too_much_time_is_refused(tmp_path: Path) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "(?:a|aa){1,18}b"}, "behavior": "Isolated", "invert": False}
    path = directory(tmp_path / "model", pre_tokenizer=sequence("pretokenizers", *[slow] * 10))
    assert (
        refusal(path, Limits(probe_s=0.05))
        == f"{path}: its tokenizer cannot be loaded: it takes too much time"
    )


def test_a_tokenizer_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    vocabulary = {f"token{index}": index for index in range(300_000)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "token0"}
    directory(path, model=model, added_tokens=[])
    assert (
        refusal(path, Limits(memory_bytes=32 << 20))
        == f"{path}: its tokenizer cannot be loaded: it takes too much memory"
    )


@pytest.mark.parametrize(
    "content",
    [
        '{"normalizer":' * 10_000,
        "[" * 1_000_000,
        '{"version": "1.0", "model": Infinity}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"\\u0000": -1}, "merges": []}}',
        "\0" * 1000,
    ],
    ids=["nested", "deep", "infinity", "negative", "nul"],
)
def test_json_of_all_kinds_is_refused(tmp_path: Path, content: str) -> None:
    path = directory(tmp_path / "model")
    (path / "tokenizer.json").write_text(content)
    assert "its tokenizer cannot be loaded: " in refusal(path)


def test_an_invalid_chat_template_is_refused_with_the_tokenizer(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    (path / "chat_template.jinja").write_text("{{ " + "9" * 5000 + " }}")
    assert "its chat template cannot be compiled: Exceeds the limit" in refusal(path)


def test_code_that_comes_with_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with suppress(CheckpointError):
        Tokenizer.load(path)
    assert not (tmp_path / "ran").exists()
