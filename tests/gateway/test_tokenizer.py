"""Texts and conversations are encoded to the same tokens as in transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.text.tokenizer import Tokenizer
from tests.gateway.support import byte_level, metaspace, metaspace_with_bytes, sentencepiece_like, word_piece
from tests.gateway.tools.models import MODELS

TEXTS = ["the dog", " two  spaces ", "Grüße, 你好 🙂\n", "<|im_start|>user", "def f(x):\n\treturn x\n", "<s>"]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "and?"},
]


BUILT = {
    "byte-level": byte_level,
    "sentencepiece-like": sentencepiece_like,
    "metaspace": metaspace,
    "metaspace-with-bytes": metaspace_with_bytes,
    "word-piece": word_piece,
    **MODELS,
}


@pytest.fixture(scope="module", params=["embedded", *BUILT])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with a tokenizer."""
    if request.param == "embedded":
        return MODEL_DIR
    path = tmp_path_factory.mktemp(request.param)
    BUILT[request.param]().pretrained.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def test_tokenizer_properties_match_those_loaded_by_transformers(directory: Path, ours: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(directory)
    assert ours.vocabulary() == reference.get_vocab()
    assert json.loads(ours.to_json()) == json.loads(reference.backend_tokenizer.to_str())
    special = [token_id for token_id, token in reference.added_tokens_decoder.items() if token.special]
    for token_id in sorted(reference.get_vocab().values())[::7]:
        assert ours.piece(token_id) == reference.backend_tokenizer.decode(
            [token_id], skip_special_tokens=False
        )
        assert ours.has_text(token_id) == (token_id not in special)


def test_texts_are_tokenised_as_in_transformers(directory: Path, ours: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for add in (True, False):
            expected = reference(text, add_special_tokens=add)["input_ids"]
            assert list(ours.encode(text, add)) == expected
            for skip in (True, False):
                assert ours.decode(expected, skip) == reference.decode(
                    expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


def test_conversations_are_tokenised_as_in_transformers(directory: Path, ours: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(directory)
    if not ours.templates.can_render:
        with pytest.raises(InvalidRequest, match="no chat template"):
            ours.templates.render(CHAT)
        return
    for add in (True, False):
        expected = reference.apply_chat_template(CHAT, add_generation_prompt=add)["input_ids"]
        assert list(ours.encode(ours.templates.render(CHAT, add), add_special_tokens=False)) == expected


def test_truncation_and_padding_of_training_do_not_reach_prompts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    backend = tokenizer.pretrained.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer.pretrained.save_pretrained(tmp_path)
    backend.no_truncation()
    backend.no_padding()
    assert Tokenizer.load(tmp_path).encode("the quick dog") == tokenizer.encode("the quick dog")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_corrupt_tokenizer_is_named_with_its_directory(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)
