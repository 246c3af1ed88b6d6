"""Tokenizers that would make a text, or themselves, too large are refused by arithmetic."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer as Backend, normalizers, pre_tokenizers

from pdserve.core.errors import CheckpointError
from pdserve.gateway.text.tokenizer_loading.growth import (
    MAX_ADDED_TOKENS,
    MAX_AFFIX_CHARS,
    MAX_TEXT_GROWTH,
    MAX_TOKEN_CHARS,
    MAX_TOKEN_ID,
    MAX_TOKENS,
    Parts,
    check_growth,
    check_vocabulary,
)
from tests.gateway.support import (
    byte_level,
    metaspace,
    metaspace_with_bytes,
    sentencepiece_like,
    word_piece,
)
from tests.gateway.tokenizer_parts import (
    byte_level_parts,
    charsmap,
    doubling,
    parts,
    replace,
    sequence,
    template,
)

GROWING = {
    "2^60 by one text": {"normalizer": doubling(60)},
    "2^60 over sequences": {"normalizer": sequence("normalizers", doubling(30), doubling(30))},
    "2^20 by bytes as letters": {"pre_tokenizer": sequence("pretokenizers", *[byte_level_parts()] * 20)},
    "both together": {
        "normalizer": doubling(7),
        "pre_tokenizer": sequence("pretokenizers", *[byte_level_parts()] * 3),
    },
    "a long replacement": {"normalizer": replace("x" * 10_000, String="a")},
    "a replacement of nothing": {"normalizer": replace("x" * 1000, String="")},
    "an expression that matches nothing": {"normalizer": replace("x" * 1000, Regex="(?=a)")},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "x" * 2000}},
    "a beginning that grows": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "a" * 900}, doubling(2))
    },
    "SentencePiece's map": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a", b"x" * 1000)}
    },
    "normal forms": {"normalizer": sequence("normalizers", *[{"type": "NFKD"}] * 3)},
    "texts repeated": {"post_processor": template(1000, 0)},
    "texts repeated in turn": {"post_processor": sequence("processors", template(2, 0), template(2, 0))},
    "many tokens for one": {"post_processor": template(1, 1_000_000)},
    "decoded": {"decoder": sequence("decoders", *[replace("aa", String="a")] * 7)},
    "decoded a little": {"decoder": sequence("decoders", *[replace("aa", String="a")] * 4)},
    "too many parts to decode": {"decoder": sequence("decoders", *[replace(" ", String="▁")] * 8)},
    "too many parts": {"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 65)},
    "endless sequences": {"normalizer": sequence("normalizers", *[sequence("normalizers")] * 100)},
    "a part of another kind": {"decoder": {"type": "Shell", "command": "\x1b[2J"}},
    "a long expression": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 5000}}},
    "a long affix": {"model": {"continuing_subword_prefix": "#" * (MAX_AFFIX_CHARS + 1)}},
    "long words": {"model": {"max_input_chars_per_word": 1_000_000}},
}


@pytest.mark.parametrize("name", GROWING)
def test_growth_is_refused_by_arithmetic(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_growth(parts(**GROWING[name]))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "kind", [byte_level, sentencepiece_like, metaspace, metaspace_with_bytes, word_piece]
)
def test_usual_tokenizers_are_within_the_bounds(kind: Any) -> None:
    check_growth(msgspec.json.decode(kind().to_json(), type=Parts))
    check_vocabulary(kind().vocabulary())


def test_the_tokenizer_of_a_multilingual_sentencepiece_is_within_the_bounds() -> None:
    """Its longest replacement has 33 bytes, like that of U+FDFA."""
    steps = (
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 33)},
        replace(" ", Regex=" {2,}"),
    )
    pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    check_growth(parts(normalizer=sequence("normalizers", *steps), pre_tokenizer=pre_tokenizer))


@pytest.mark.parametrize(
    "inner", [lambda part: part, lambda part: sequence("decoders", {"type": "Fuse"}, part)]
)
def test_a_decoder_has_no_expressions(inner: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"its decoder replaces an expression \(Regex\), expected a text \(String\)"
    ):
        check_growth(parts(decoder=inner(replace("", Regex=r"(?=w[i]th statement)(?:.|.|.|.|.|.|.){8}\b\B"))))


def test_a_decoder_searches_for_short_texts_only() -> None:
    check_growth(parts(decoder=replace("", String="x" * 16)))
    with pytest.raises(CheckpointError, match="its decoder replaces a text of more than 16 characters"):
        check_growth(parts(decoder=replace("", String="x" * 17)))


def test_a_randomised_tokenizer_is_refused() -> None:
    check_growth(parts(model={"dropout": 0.0}))
    with pytest.raises(CheckpointError, match=r"its model's dropout is 0\.5, expected none"):
        check_growth(parts(model={"dropout": 0.5}))


def test_too_many_tokens_are_refused() -> None:
    check_vocabulary(dict.fromkeys(map(str, range(MAX_TOKENS)), 0), MAX_ADDED_TOKENS)
    with pytest.raises(CheckpointError, match="it has 2000001 tokens, expected at most 2000000"):
        check_vocabulary(dict.fromkeys(map(str, range(MAX_TOKENS + 1)), 0))
    with pytest.raises(CheckpointError, match="it has 65537 added tokens, expected at most 65536"):
        check_vocabulary({}, MAX_ADDED_TOKENS + 1)


@pytest.mark.parametrize("vocabulary", [{"x" * (MAX_TOKEN_CHARS + 1): 0}, {"a": MAX_TOKEN_ID + 1}])
def test_long_tokens_and_large_ids_are_refused(vocabulary: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="it has a token"):
        check_vocabulary(vocabulary)


STEPS = st.sampled_from(
    [
        normalizers.NFC(),
        normalizers.NFD(),
        normalizers.NFKC(),
        normalizers.NFKD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.BertNormalizer(),
        normalizers.Nmt(),
        normalizers.Strip(),
        normalizers.ByteLevel(),
        normalizers.Prepend("▁x"),
        normalizers.Replace("a", "bcd"),
        normalizers.Replace("ab", "x"),
    ]
)


TEXTS = st.text(
    st.sampled_from("abc ÄȺİ中\ufdfa\u0390\u1e69\U0001d160\0") | st.characters(exclude_categories=["Cs"]),
    max_size=20,
)


@given(st.lists(STEPS, max_size=3), TEXTS)
def test_no_text_grows_beyond_the_bound(steps: list[Any], text: str) -> None:
    backend = Backend.from_str(byte_level().to_json())
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()])
    try:
        check_growth(msgspec.json.decode(backend.to_str(), type=Parts))
    except CheckpointError:
        return
    pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    assert sum(len(piece.encode()) for piece, _ in pieces) <= MAX_TEXT_GROWTH * len(text.encode()) + 1024
