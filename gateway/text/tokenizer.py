"""Translates between text and token ids, as the checkpoint defines it: its tokenizer, and its chat template.

Prompts arrive as text or conversations and leave as token ids; `gateway.text.detokenizer` uses it for the
reverse."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ...core.errors import CheckpointError, InvalidRequest
from .chat_template import ChatTemplates
from .tokenizer_loading.messages import TokenizerData
from .tokenizer_loading.process import load
from .tokenizer_loading.usual import may_stall

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's spelling of bytes outside its vocabulary


def _byte_letters() -> dict[str, int]:
    """Returns GPT-2's letters for bytes: printable ones stand for themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_letters()


class Tokenizer:
    """One checkpoint's tokenizer. Encoding and decoding may run on several threads at once."""

    def __init__(self, data: TokenizerData) -> None:
        """Raises CheckpointError if a chat template is invalid."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: no thread pool
        self.data = data
        self._backend = Backend.from_str(data.backend_json)
        self._backend.encode_special_tokens = data.encode_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self.templates = ChatTemplates(data.templates)
        # even on short texts, which then go to the intake process
        self.may_stall = may_stall(data.backend_json)
        self.max_token_chars = max(map(len, self._backend.get_vocab()), default=1)  # added tokens included
        self._pieces: dict[int, str] = {}  # at most as many as the vocabulary has
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        """Loads the tokenizer of the checkpoint in `path`. Raises CheckpointError. Takes seconds: another
        process loads it first, so that a hostile one does no harm here."""
        data = load(path)
        try:
            return Tokenizer(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """As in tokenizer.json."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Returns the token ids of `text`; names of special tokens in it become these tokens. Raises
        InvalidRequest for a text that the tokenizer fails on, e.g. because one of its regular expressions
        backtracks endlessly."""
        return tuple(self._encoding(text, add_special_tokens).ids)

    def count(self, text: str) -> int:
        """Returns how many tokens `text` has by itself. Raises as `encode`."""
        return len(self._encoding(text, add_special_tokens=False))

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        """Encodes without offsets, which are not needed; as a batch, since `encode` holds the GIL until it is
        done."""
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not _is_panic(error):
                raise
            expected = "a text that the model's tokenizer can take"
            raise InvalidRequest("prompt", f"{len(text)} characters", expected) from None
        return encoding

    def has_text(self, token_id: int) -> bool:
        """Whether a token stands for text: it is in the vocabulary and not special."""
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The tokens that were added to the trained vocabulary, special ones and others, by the text that
        they stand for."""
        return self._added_ids

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of all tokens, by their names. A copy, which takes a moment."""
        return self._backend.get_vocab(with_added_tokens=True)

    def piece(self, token_id: int) -> str:
        """Returns the text of a token by itself; a part of a character shows as U+FFFD."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.decode([token_id])
        return piece

    def piece_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for, which may be a part of a character."""
        piece = self.piece(token_id)
        name = self._backend.id_to_token(token_id) or ""
        if "\ufffd" not in piece:
            return piece.encode()
        if (match := _BYTE.fullmatch(name)) is not None:
            return bytes([int(match[1], 16)])
        if all(char in _BYTE_OF_LETTER for char in name):
            return bytes(_BYTE_OF_LETTER[char] for char in name)
        return piece.encode()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of tokens; invalid UTF-8 becomes U+FFFD. Raises InvalidRequest for tokens that the
        tokenizer fails on."""
        try:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            if not _is_panic(error):
                raise
            expected = "tokens that the model's tokenizer can decode"
            raise InvalidRequest("token_ids", f"{len(token_ids)} tokens", expected) from None


def _is_panic(error: BaseException) -> bool:
    """Returns whether Rust code has panicked, which pyo3 does not raise as an Exception, so that it would
    bypass handlers that expect one."""
    return type(error).__name__ == "PanicException"
