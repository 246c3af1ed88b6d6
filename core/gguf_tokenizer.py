"""A GGUF file's tokenizer in the format of tokenizer.json, from the file's metadata alone.

Text is split as llama.cpp splits it (src/llama-vocab.cpp there); a splitting of another name is refused,
because a text would become other tokens than the model was trained with."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import msgspec

from .checkpoint_files import shown
from .errors import CheckpointError

MAX_TOKEN_CHARS = 1024
# each of a SentencePiece vocabulary is a place to cut; 262,144 tokens have 1.9 million
MAX_VOCABULARY_CHARS = 1 << 22
MAX_MERGES = 1 << 20  # of a SentencePiece vocabulary; 262,144 tokens have 580,000
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_SPACE = "▁"  # SentencePiece's spelling of a space

# parts of expressions that cut a text into words
SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{SHORT_FORMS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{SPACES}"
QWEN2 = rf"{SHORT_FORMS}|{BEFORE}\p{{L}}+|\p{{N}}|{SIGNS}[\r\n]*|{SPACES}"
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{SIGNS}[\r\n/]*|{SPACES}"
_GPT2, _SINGLE_DIGITS = "gpt-2", "single digits"
_SPLITS = {
    **dict.fromkeys(("default", "gpt-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")  # merged without merges


def gguf_tokenizer_json(metadata: Mapping[str, Any], source: str) -> str:
    """Returns the text of a tokenizer.json; `source` names the file in messages. Raises CheckpointError."""
    fields = _Fields(metadata, source)
    model = fields.text("tokenizer.ggml.model")
    builders: dict[str, Callable[[_Fields], dict[str, Any]]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(
            f"{source}: tokenizer.ggml.model: {shown(model)} is not supported, expected gpt2 or llama"
        )
    try:
        parts = builders[model](fields)
        special = special_tokens(metadata, source)
        parts |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(fields)}
        begins = fields.flag("tokenizer.ggml.add_bos_token", model == "llama") and special.get("bos_token")
        ends = fields.flag("tokenizer.ggml.add_eos_token", False) and special.get("eos_token")
        if begins or ends:
            parts["post_processor"] = _template(parts["model"]["vocab"], begins or None, ends or None)
        return msgspec.json.encode(parts).decode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{source}: a token is not valid Unicode") from None


def special_tokens(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """Returns the names of special tokens by role: bos_token, eos_token and others. Raises
    CheckpointError."""
    tokens = _Fields(metadata, source).texts("tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for role, key in roles.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            found[role] = tokens[token_id]
    return found


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name; the main one is "default"."""
    prefix = "tokenizer.chat_template"
    return {
        key[len(prefix) + 1 :] or "default": value
        for key, value in metadata.items()
        if isinstance(value, str) and (key == prefix or key.startswith(f"{prefix}."))
    }


class _Fields:
    """Typed access to the metadata."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "a list of texts")
        return value

    def tokens(self) -> list[str]:
        key = "tokenizer.ggml.tokens"
        tokens = self.texts(key)
        longest, total = max(map(len, tokens), default=0), sum(map(len, tokens))
        if longest > MAX_TOKEN_CHARS or total > MAX_VOCABULARY_CHARS:
            raise CheckpointError(
                f"{self.source}: {key}: the longest has {longest} characters, all together {total},"
                f" expected at most {MAX_TOKEN_CHARS} and {MAX_VOCABULARY_CHARS}"
            )
        return tokens

    def numbers(self, key: str, length: int) -> list[float]:
        value = self.metadata.get(key)
        is_list = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
        if not is_list or len(value or ()) != length:
            raise self.refuse(key, f"a list of {length} numbers")
        return list(value or ())

    def refuse(self, key: str, wanted: str) -> CheckpointError:
        value = self.metadata.get(key)
        got = "nothing" if value is None else shown(value)
        return CheckpointError(f"{self.source}: {key}: got {got}, expected {wanted}")


def _byte_level(fields: _Fields) -> dict[str, Any]:
    """GPT-2's kind: bytes as letters, merged within the words that the splitting finds."""
    name = fields.text("tokenizer.ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise CheckpointError(
            f"{fields.source}: tokenizer.ggml.pre: {shown(name)} is not supported, expected one of"
            f" {', '.join(sorted(_SPLITS))}"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    is_gpt2 = split in (_GPT2, _SINGLE_DIGITS)
    before: list[dict[str, Any]] = []
    if split == _SINGLE_DIGITS:
        before = [{"type": "Digits", "individual_digits": True}]
    elif not is_gpt2:
        before = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}]
    merges = [merge.split(" ") for merge in fields.texts("tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(
            f"{fields.source}: tokenizer.ggml.merges: expected two texts and a space in each"
        )
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*before, byte_level | {"use_regex": is_gpt2}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(fields, merges, ignore_merges=name in _WHOLE_WORDS),
    }


def _sentencepiece(fields: _Fields) -> dict[str, Any]:
    """SentencePiece's kind: merges in the order of the merged tokens' scores; unknown letters as bytes."""
    has_prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokens = fields.tokens()
    scores = fields.numbers("tokenizer.ggml.scores", len(tokens))
    unknown = special_tokens({"tokenizer.ggml.unknown_token_id": 0} | dict(fields.metadata), fields.source)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(fields, _merges(fields, tokens, scores), byte_fallback=True, fuse_unk=True)
        | {"unk_token": unknown.get("unk_token")},
    }


def _bpe(fields: _Fields, merges: list[list[str]], **options: bool) -> dict[str, Any]:
    tokens = fields.tokens()
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{fields.source}: tokenizer.ggml.tokens: a token occurs twice")
    unknown = next((part for pair in merges for part in (*pair, "".join(pair)) if part not in vocab), None)
    if unknown is not None:
        raise CheckpointError(f"{fields.source}: tokenizer.ggml.merges: {shown(unknown)} is not a token")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    } | options


def _merges(fields: _Fields, tokens: list[str], scores: list[float]) -> list[list[str]]:
    """Returns the pairs of tokens that make another one, in the order of its score: SentencePiece merges the
    pair whose token has the highest score."""
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    found = (
        (-scores[token_id], vocab[left], vocab[right], left, right)
        for token_id, token in enumerate(tokens)
        for index in range(1, len(token))
        if (left := token[:index]) in vocab and (right := token[index:]) in vocab
    )
    ranked = list(islice(found, MAX_MERGES + 1))
    if len(ranked) > MAX_MERGES:
        raise CheckpointError(
            f"{fields.source}: tokenizer.ggml.tokens: more than {MAX_MERGES} pairs of them make another one"
        )
    return [[left, right] for *_, left, right in sorted(ranked)]


def _added(fields: _Fields) -> list[dict[str, Any]]:
    """Returns the tokens that a text is searched for before it is split."""
    tokens = fields.texts("tokenizer.ggml.tokens")
    kinds = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token_id, "content": token, **flags, "special": kind == _CONTROL}
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]


def _template(vocab: Mapping[str, int], begins: str | None, ends: str | None) -> dict[str, Any]:
    """Returns the part that puts special tokens before and behind a text."""

    def around(names: list[str], type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": begins, "type_id": type_id}}] if begins else []
        behind = [{"SpecialToken": {"id": ends, "type_id": type_id}}] if ends else []
        return [*before, *({"Sequence": {"id": name, "type_id": type_id}} for name in names), *behind]

    return {
        "type": "TemplateProcessing",
        "single": around(["A"], 0),
        "pair": around(["A"], 0) + around(["B"], 1),
        "special_tokens": {
            name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in (begins, ends) if name
        },
    }
