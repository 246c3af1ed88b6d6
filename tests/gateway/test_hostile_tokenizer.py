"""Malicious tokenizers end in a checkpoint error, and harm only the process that exists for loading them."""

import base64
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tokenizers import Regex, Tokenizer as Backend, decoders, normalizers, pre_tokenizers

from pdserve.core.checkpoint_files import MAX_TOKENIZER_BYTES
from pdserve.core.config import LimitsSection
from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.intake import Intake
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.text.tokenizer import Tokenizer
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
from pdserve.gateway.text.tokenizer_loading.main import exported
from pdserve.gateway.text.tokenizer_loading.messages import DEFAULT_LIMITS, Limits
from pdserve.gateway.text.tokenizer_loading.process import MAX_TEMPLATE_BYTES, load
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import (
    Unchecked,
    byte_level,
    metaspace,
    metaspace_with_bytes,
    model_info,
    sentencepiece_like,
    word_piece,
)

Json = dict[str, Any]


def sequence(name: str, *parts: Json) -> Json:
    return {"type": "Sequence", name: list(parts)}


def replace(content: str, **pattern: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def doubling(times: int) -> Json:
    return sequence("normalizers", *[replace("aa", String="a")] * times)


def template(num_texts: int, num_ids: int) -> Json:
    special = {"x": {"id": "x", "ids": [0] * num_ids, "tokens": ["x"] * num_ids}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * num_texts + [
        {"SpecialToken": {"id": "x", "type_id": 0}}
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def charsmap(*replacements: bytes) -> str:
    """SentencePiece's map without a tree."""
    return base64.b64encode(bytes(4) + b"\0".join(replacements)).decode()


def byte_level_parts(add_prefix_space: bool = False) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def parts(**changes: Any) -> Parts:
    return msgspec.convert({"model": {}} | changes, Parts)


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


def test_a_text_that_the_tokenizer_fails_on_is_an_invalid_request() -> None:
    data = exported(byte_level().pretrained)
    backend = Backend.from_str(data.backend_json)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(b+)+$"), "isolated")
    tokenizer = Tokenizer(msgspec.structs.replace(data, backend_json=backend.to_str()))
    assert tokenizer.encode("abc")
    with pytest.raises(InvalidRequest, match="expected a text that the model's tokenizer can take"):
        tokenizer.encode("b" * 64 + "!")


def test_tokens_that_the_tokenizer_fails_on_are_an_invalid_request() -> None:
    data = exported(byte_level().pretrained)
    backend = Backend.from_str(data.backend_json)
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(Regex("(b+)+$"), "")]
    )
    tokenizer = Tokenizer(msgspec.structs.replace(data, backend_json=backend.to_str()))
    (token_id,) = tokenizer.encode("b", add_special_tokens=False)
    other = tokenizer.encode("!", add_special_tokens=False)
    assert tokenizer.decode(other) == "!"
    with pytest.raises(InvalidRequest, match="expected tokens that the model's tokenizer can decode"):
        tokenizer.decode([token_id] * 64 + list(other))


def changed(**changes: Any) -> Tokenizer:
    """A byte-level tokenizer whose JSON has `changes`."""
    data = exported(byte_level().pretrained)
    return Tokenizer(
        msgspec.structs.replace(data, backend_json=json.dumps(json.loads(data.backend_json) | changes))
    )


def split(**pattern: str) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "kind", [byte_level, sentencepiece_like, metaspace, metaspace_with_bytes, word_piece]
)
def test_usual_tokenizers_do_not_stall(kind: Any) -> None:
    assert not kind().may_stall


@pytest.mark.parametrize("expression", [LLAMA_3, QWEN_2, TEKKEN], ids=["Llama 3", "Qwen 2", "Tekken"])
def test_the_expressions_of_public_checkpoints_do_not_stall(expression: str) -> None:
    steps = sequence("pretokenizers", split(Regex=expression), byte_level_parts())
    assert not changed(pre_tokenizer=steps, normalizer={"type": "NFC"}).may_stall


UNUSUAL = {
    "an expression": {"pre_tokenizer": split(Regex=LLAMA_3 + "|x")},
    "an expression of a normalizer": {
        "normalizer": sequence("normalizers", {"type": "NFC"}, replace("", Regex="a?"))
    },
    "a long text": {"pre_tokenizer": split(String="a" * 17)},
    "growth": {"normalizer": replace("x" * 17, String="a")},
    "parts": {"normalizer": sequence("normalizers", *[{"type": "Lowercase"}] * 8)},
}


@pytest.mark.parametrize("name", UNUSUAL)
async def test_an_unusual_tokenizer_encodes_the_shortest_text_in_the_intake_process(name: str) -> None:
    class Recording(Offload):
        async def encode(self, text: str, *_: object) -> tuple[int, ...]:
            return (1,)

        async def render(self, *_: object) -> str:
            return "a"

    tokenizer = changed(**UNUSUAL[name])
    info = model_info(byte_level())
    intake = Intake(tokenizer, info, Unchecked(), Recording(tokenizer, info.name, info.max_model_len))
    limits = LimitsSection()
    assert await intake.token_ids(pb.Prompt(text="a"), limits, "client") == (1,)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")])
    assert await intake.token_ids(pb.Prompt(chat=chat), limits, "client") == (1,)
