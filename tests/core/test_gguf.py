"""A GGUF file's header within bounds, and its tokenizer as the tokenizer.json that it was made from."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from pdserve.core import gguf_tokenizer
from pdserve.core.checkpoint_files import read_bytes
from pdserve.core.errors import CheckpointError
from pdserve.core.gguf_file import MAX_ITEMS, MAX_STRING_BYTES, read_gguf_header
from pdserve.core.gguf_tokenizer import chat_templates, gguf_tokenizer_json, special_tokens
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.text.tokenizer_loading.usual import may_stall
from tests.gguf_files import add_tokenizer, write_metadata

TEXTS = (
    "The with statement",
    "  two  spaces\n\n\tand 1234 + 5.6",
    "äöü 你好 👍🏽",
    "it's I'LL <|user|>hi<|end|>",
    "",
)


def header_bytes(*pairs: bytes, num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(pairs)) + b"".join(pairs)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    file = write_metadata(
        folder / "m.gguf", a__text="hello", a__list=[1, 2, 3], a__texts=["x", "y"], a__flag=True
    )
    return file.read_bytes()


def test_values_of_every_kind_are_read(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "a__int": 7,
        "a__float": 0.5,
        "a__text": "é",
        "a__flag": False,
        "a__list": [1, 2],
    }
    header = read_gguf_header(write_metadata(tmp_path / "m.gguf", **values, a__texts=["p", "q"]))
    expected = {name.replace("__", "."): value for name, value in values.items()} | {"a.texts": ["p", "q"]}
    assert header.metadata == {"general.architecture": "llama"} | expected
    assert header.tensors == {}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(small)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    with suppress(CheckpointError):
        read_gguf_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4" + b"\0" * 40, "not a GGUF file: it does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported, expected 2 or 3"),
        (header_bytes(num_tensors=1 << 40), "number of tensors: got 1099511627776"),
        (header_bytes(text(b"k") + struct.pack("<IQ", 8, MAX_STRING_BYTES + 1)), "length of k: got 1048577"),
        (header_bytes(text(b"k") + struct.pack("<IIQ", 9, 0, MAX_ITEMS + 1)), "length of k: got 2097153"),
        (header_bytes(text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "k: a list of type 9"),
        (header_bytes(text(b"k") + struct.pack("<I", 99)), "k: unknown type 99"),
        (header_bytes(*(text(b"k") + struct.pack("<IB", 7, 1),) * 2), "key k occurs twice"),
        (header_bytes(text(b"\xff")), "key: not UTF-8"),
        (header_bytes(text(b"a/../b")), "a key is named 'a/../b'"),
    ],
)
def test_what_is_beyond_a_bound_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_gguf_header(file)
    assert message in str(error.value)


def embedded_metadata(tmp_path: Path, pre: str = "default") -> dict[str, Any]:
    """The metadata of a file with the embedded model's tokenizer."""
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    tokenizer_json = read_bytes(MODEL_DIR / "tokenizer.json", 1 << 22).decode()
    add_tokenizer(writer, tokenizer_json, pre, eos=0, bos=1)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_header(tmp_path / "m.gguf").metadata


def test_a_byte_level_tokenizer_encodes_as_its_original(tmp_path: Path) -> None:
    metadata = embedded_metadata(tmp_path)
    made = Tokenizer.from_str(gguf_tokenizer_json(metadata, "m"))
    original = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    for words in TEXTS:
        assert made.encode(words).ids == original.encode(words).ids
        assert made.decode(made.encode(words).ids, skip_special_tokens=False) == words
    assert special_tokens(metadata, "m") == {"eos_token": "<|endoftext|>", "bos_token": "<|system|>"}
    assert chat_templates(metadata) == {"default": "{{ messages }}"}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_splittings_are_of_those_that_cannot_stall(tmp_path: Path, pre: str) -> None:
    made = gguf_tokenizer_json(embedded_metadata(tmp_path, pre), "m")
    Tokenizer.from_str(made)
    assert not may_stall(made)


def test_single_digits_are_split_also_behind_spaces(tmp_path: Path) -> None:
    made = Tokenizer.from_str(gguf_tokenizer_json(embedded_metadata(tmp_path, "smollm"), "m"))
    pieces = [made.decode([token_id]) for token_id in made.encode("x = 120").ids]
    assert pieces[-3:] == ["1", "2", "0"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_begin_token_is_added_where_the_file_says_so(tmp_path: Path, add_bos: bool) -> None:
    metadata = embedded_metadata(tmp_path) | {"tokenizer.ggml.add_bos_token": add_bos}
    made = Tokenizer.from_str(gguf_tokenizer_json(metadata, "m"))
    assert (made.encode("hello").ids[0] == 1) == add_bos


SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    + [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "ll",
        "he",
        "▁w",
        "hell",
        "▁hello",
        "or",
        "▁wor",
        "hello",
        "ld",
    ],
    "tokenizer.ggml.scores": [0.0] * 259
    + [-100.0] * 8
    + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), *([1] * 17)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


@pytest.mark.parametrize("words", ["hello world", "hello  world é", "hé", "world hello\n"])
def test_a_sentencepiece_tokenizer_encodes_as_transformers(words: str) -> None:
    tokens, scores = SENTENCEPIECE["tokenizer.ggml.tokens"], SENTENCEPIECE["tokenizer.ggml.scores"]
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    reference = LlamaTokenizer(vocab=vocab, merges=merges)
    made = Tokenizer.from_str(gguf_tokenizer_json(SENTENCEPIECE, "m"))
    assert made.encode(words).ids == [1, *reference(words, add_special_tokens=False)["input_ids"]]
    assert made.decode(made.encode(words).ids) == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported, expected gpt2"),
        ({"tokenizer.ggml.pre": "other"}, "tokenizer.ggml.pre: 'other' is not supported, expected one of"),
        ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens: got 5, expected a list of texts"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type: got [1], expected a list of 4096"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: expected two texts"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizer.ggml.merges: 'zz' is not a token"),
        ({"tokenizer.ggml.tokens": ["a" * 1025]}, "tokenizer.ggml.tokens: the longest has 1025 characters"),
        (
            {"tokenizer.ggml.tokens": ["a" * 1024] * 4097},
            "tokenizer.ggml.tokens: the longest has 1024 characters, all together 4195328",
        ),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused_by_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        json.loads(gguf_tokenizer_json(embedded_metadata(tmp_path) | change, "m.gguf"))
    assert f"m.gguf: {message}" in str(error.value)


def test_a_vocabulary_that_explodes_into_merges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "MAX_MERGES", 1000)
    tokens = ["a" * number for number in range(1, 65)]
    lists = {"tokens": tokens, "scores": [0.0] * len(tokens), "token_type": [1] * len(tokens)}
    metadata = SENTENCEPIECE | {f"tokenizer.ggml.{name}": values for name, values in lists.items()}
    with pytest.raises(CheckpointError, match="more than 1000 pairs of them make another one"):
        gguf_tokenizer_json(metadata, "m.gguf")
