"""Bounds how much a tokenizer can lengthen a text, derived from the tokenizer's parts without running them.

Lengths are in bytes of UTF-8, in tokens where a post-processor counts. Each part turns n into at most factor
* n + constant, and so does a chain of parts. An unknown part is refused, as its growth is unknown."""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from ....core.checkpoint_files import shown
from ....core.errors import CheckpointError

# by normaliser and pre-tokeniser; 6 is usual, SentencePiece's normalisation has 33 at worst
MAX_TEXT_GROWTH = 512
MAX_TOKEN_GROWTH = 2  # by the post-processor
MAX_DECODED_GROWTH = 8  # by the decoder, of each token; 3 is usual
MAX_ADDED = 1024  # bytes or tokens, whatever the length
MAX_PARTS = 64  # of one kind
MAX_DECODER_PARTS = 8  # every output token passes through them, on the server's loop
MAX_DECODED_PATTERN_CHARS = 16
MAX_PATTERN_CHARS = 4096
MAX_TOKEN_CHARS = 1024
MAX_AFFIX_CHARS = 64  # of the affix that a model adds to each piece of a word
MAX_WORD_CHARS = 1000  # WordPiece's work grows with its square
MAX_TOKEN_ID = 1 << 24  # tables have a place for each id
MAX_TOKENS = 2_000_000
MAX_ADDED_TOKENS = 1 << 16

Part = Mapping[str, Any]
Growth = tuple[float, float]  # factor, constant

# Unicode Standard Annex 15, section 9: the largest factors of UTF-8. Lowercase: U+023A.
_NFC, _NFK, _LOWER = 3.0, 11.0, 1.5
_SAME: Growth = (1.0, 0.0)


class _Model(msgspec.Struct):
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    max_input_chars_per_word: int = 0
    dropout: float | None = None


class Parts(msgspec.Struct):
    """A tokenizer's JSON without its vocabulary."""

    model: _Model
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None

    def patterns(self) -> list[str]:
        """Returns the texts and expressions that parts search for."""
        decoded = [_pattern(part) for part in _chain(self.decoder)]
        return [text for pattern in [*self.searched(), *decoded] for text in pattern.values()]

    def searched(self) -> list[Mapping[str, str]]:
        """Returns the patterns that are searched for in a text on its path to tokens: each a `String` or a
        `Regex`."""
        return [_pattern(part) for chain in (self.normalizer, self.pre_tokenizer) for part in _chain(chain)]


def check_growth(parts: Parts) -> None:
    """Raises CheckpointError if a text, its tokens or their text can grow beyond the bounds above."""
    check_text_growth(parts)
    _Chain("post_processor", MAX_TOKEN_GROWTH).add(parts.post_processor, _POST_PROCESSORS)
    _Chain("decoder", MAX_DECODED_GROWTH, MAX_DECODER_PARTS).add(parts.decoder, _DECODERS)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(parts.model, name) or "") > MAX_AFFIX_CHARS:
            raise CheckpointError(f"its model's {name} is longer than {MAX_AFFIX_CHARS} characters")
    if parts.model.max_input_chars_per_word > MAX_WORD_CHARS:
        raise CheckpointError(f"its model's max_input_chars_per_word is above {MAX_WORD_CHARS}")
    if parts.model.dropout:
        raise CheckpointError(
            f"its model's dropout is {parts.model.dropout:g}, expected none: a text's tokens would be random"
        )


def check_text_growth(parts: Parts, max_factor: float = MAX_TEXT_GROWTH, max_parts: int = MAX_PARTS) -> None:
    """Raises CheckpointError if a text can grow beyond the bounds on its path to the model, or has too many
    parts to pass."""
    text = _Chain("normalizer and pre_tokenizer", max_factor, max_parts)
    text.add(parts.normalizer, _NORMALIZERS)
    text.add(parts.pre_tokenizer, _PRE_TOKENIZERS)


def check_vocabulary(vocabulary: Mapping[str, int], num_added: int = 0) -> None:
    """Raises CheckpointError."""
    if len(vocabulary) > MAX_TOKENS:
        raise CheckpointError(f"it has {len(vocabulary)} tokens, expected at most {MAX_TOKENS}")
    if num_added > MAX_ADDED_TOKENS:
        raise CheckpointError(f"it has {num_added} added tokens, expected at most {MAX_ADDED_TOKENS}")
    if max(map(len, vocabulary), default=0) > MAX_TOKEN_CHARS:
        raise CheckpointError(f"it has a token of more than {MAX_TOKEN_CHARS} characters")
    if max(vocabulary.values(), default=0) > MAX_TOKEN_ID:
        raise CheckpointError(f"it has a token whose id is above {MAX_TOKEN_ID}")


class _Chain:
    """The growth of consecutive parts."""

    def __init__(self, name: str, max_factor: float, max_parts: int = MAX_PARTS) -> None:
        self._name, self._max_factor, self._max_parts = name, max_factor, max_parts
        self._factor, self._constant = _SAME

    def add(self, part: Part | None, kinds: Mapping[str, Callable[[Part], Growth]]) -> None:
        for step in _chain(part, self._max_parts):
            kind = kinds.get(str(step.get("type")))
            if kind is None:
                raise CheckpointError(
                    f"its {self._name} has a part of type {shown(step.get('type'))}, which is not supported"
                )
            if any(len(text) > MAX_PATTERN_CHARS for text in _pattern(step).values()):
                raise CheckpointError(
                    f"its {self._name} has a pattern of more than {MAX_PATTERN_CHARS} characters"
                )
            factor, constant = kind(step)
            self._factor, self._constant = self._factor * factor, self._constant * factor + constant
            if (
                self._factor > self._max_factor or self._constant > MAX_ADDED
            ):  # at once, before a product overflows
                raise CheckpointError(
                    f"its {self._name} can make a text {self._factor:.6g} times as long and"
                    f" {self._constant:.6g} longer, expected at most {self._max_factor:g} times and"
                    f" {MAX_ADDED}"
                )


def _chain(part: Part | None, max_parts: int = MAX_PARTS) -> Iterator[Part]:
    """Returns the parts of a composite part, in order."""
    waiting = [] if part is None else [part]
    num_parts = 0
    while waiting:
        part = waiting.pop()
        num_parts += 1
        if num_parts > max_parts:
            raise CheckpointError(f"it has a sequence of more than {max_parts} parts")
        if part.get("type") != "Sequence":
            yield part
            continue
        inner = next((part[name] for name in _SEQUENCES if name in part), ())
        waiting.extend(reversed(inner))


_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def _pattern(part: Part) -> Mapping[str, str]:
    pattern = part.get("pattern")
    return pattern if isinstance(pattern, Mapping) else {}


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _fixed(factor: float, constant: float = 0.0) -> Callable[[Part], Growth]:
    return lambda _: (factor, constant)


def _replace(part: Part) -> Growth:
    """A text matches at most once per its own length; an expression may match nothing, before each byte and
    at the end."""
    pattern, put = _pattern(part), _num_bytes(part["content"])
    if "String" not in pattern:
        return 1.0 + put, put
    if not pattern["String"]:
        raise CheckpointError("it replaces an empty text, over which the tokenizers library fails")
    return max(1.0, put / _num_bytes(pattern["String"])), 0.0


def _replace_decoded(part: Part) -> Growth:
    """No sample texts can prove that an expression is never slow, and no known tokenizer decodes with one."""
    pattern = _pattern(part)
    if "String" not in pattern:
        raise CheckpointError("its decoder replaces an expression (Regex), expected a text (String)")
    if len(pattern["String"]) > MAX_DECODED_PATTERN_CHARS:
        raise CheckpointError(
            f"its decoder replaces a text of more than {MAX_DECODED_PATTERN_CHARS} characters"
        )
    return _replace(part)


def _prepend(part: Part) -> Growth:
    return 1.0, _num_bytes(part["prepend"])


def _precompiled(part: Part) -> Growth:
    """Reads SentencePiece's map: the length of a search tree, the tree, and all replacements, each terminated
    by NUL."""
    try:
        data = base64.b64decode(part.get("precompiled_charsmap") or "")
    except binascii.Error as error:
        raise CheckpointError(f"its normalizer's precompiled_charsmap is not base64: {error}") from None
    replacements = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1.0, *map(len, replacements.split(b"\0"))), 0.0


def _byte_level(part: Part) -> Growth:
    """Each byte becomes a letter of up to two; a space may come before each piece."""
    return (4.0, 2.0) if part.get("add_prefix_space") else (2.0, 0.0)


def _metaspace(part: Part) -> Growth:
    """The letter for a space stands for each, and may come before each piece."""
    num_bytes = _num_bytes(part.get("replacement", "▁"))
    return 1.0 + num_bytes, num_bytes


def _template(part: Part) -> Growth:
    """A text may be repeated; special tokens stand for as many as they list."""
    named = part.get("special_tokens") or {}
    special = [piece["SpecialToken"]["id"] for piece in part["single"] if "SpecialToken" in piece]
    return sum("Sequence" in piece for piece in part["single"]), sum(
        len(named[name]["ids"]) for name in special
    )


def _unless_empty(name: str) -> Callable[[Part], Growth]:
    """A text is replaced by a space; an empty one is found everywhere."""
    return lambda part: _SAME if part.get(name) else (2.0, 1.0)


_NORMALIZERS: dict[str, Callable[[Part], Growth]] = {
    "BertNormalizer": _fixed(
        5 / 3 * _NFC * _LOWER
    ),  # spaces around CJK characters, accents apart, lower case
    "ByteLevel": _byte_level,
    "Lowercase": _fixed(_LOWER),
    "NFC": _fixed(_NFC),
    "NFD": _fixed(_NFC),
    "NFKC": _fixed(_NFK),
    "NFKD": _fixed(_NFK),
    "Nmt": _fixed(1),
    "Precompiled": _precompiled,
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _fixed(1),
    "StripAccents": _fixed(1),
}
_PRE_TOKENIZERS: dict[str, Callable[[Part], Growth]] = {
    "BertPreTokenizer": _fixed(1),
    "ByteLevel": _byte_level,
    "CharDelimiterSplit": _fixed(1),
    "Digits": _fixed(1),
    "FixedLength": _fixed(1),
    "Metaspace": _metaspace,
    "Punctuation": _fixed(1),
    "Split": _fixed(1),
    "UnicodeScripts": _fixed(1),
    "Whitespace": _fixed(1),
    "WhitespaceSplit": _fixed(1),
}
_POST_PROCESSORS: dict[str, Callable[[Part], Growth]] = {
    "BertProcessing": _fixed(1, 2),
    "ByteLevel": _fixed(1),
    "RobertaProcessing": _fixed(1, 2),
    "TemplateProcessing": _template,
}
_DECODERS: dict[str, Callable[[Part], Growth]] = {
    "BPEDecoder": _unless_empty("suffix"),
    "ByteFallback": _fixed(1),
    "ByteLevel": _fixed(3),  # a byte that is invalid UTF-8 becomes U+FFFD
    "CTC": _unless_empty("word_delimiter_token"),
    "Fuse": _fixed(1),
    "Metaspace": _fixed(1),
    "Replace": _replace_decoded,
    "Strip": _fixed(1),
    "WordPiece": _fixed(1, 1),
}
