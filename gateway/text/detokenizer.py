"""Detokenises a choice token by token: never emits half a character, at a cost independent of the text's
length.

A token's text depends on its neighbours: characters may be spread over tokens, and some decoders drop a
leading space. So tokens are decoded in a window that starts where the previous text is complete; whatever the
window's text has gained is new."""

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

_REPLACEMENT = "\ufffd"
_MAX_TAIL = 3  # bytes, hence replacement characters, that an incomplete character can have
_NUM_CONTEXT = 6  # prompt tokens at the start of the first window
_MAX_WINDOW = 64  # tokens; reached only in output that is not UTF-8


class TokenDecoder(Protocol):
    """The tokenizer interface that detokenising needs."""

    def has_text(self, token_id: int) -> bool: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class Detokenizer:
    """The text of one choice, as a continuation of its prompt. Special tokens have no text."""

    def __init__(self, tokenizer: TokenDecoder, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window, text = _context(tokenizer, prompt_token_ids)
        self._emitted = text[: _complete(text)]  # the window's text that was emitted
        # tokens of the window whose text was all emitted
        self._num_settled = len(self._window) if self._emitted == text else 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(_REPLACEMENT):
            delta = text[len(self._emitted) :]
            self._shift()
            return delta
        if len(self._window) > _MAX_WINDOW:
            return self._cut(text)
        # a run of byte tokens decodes as such until its last character is complete
        certain = text.rstrip(_REPLACEMENT)
        delta = certain[len(self._emitted) :] if certain.startswith(self._emitted) else ""
        self._emitted += delta
        return delta

    def flush(self) -> str:
        """Returns the text that remains at the end: the replacement characters of an incomplete character."""
        text = self._tokenizer.decode(self._window) if self._window else ""
        delta = text[len(self._emitted) :]
        self._emitted = text
        return delta

    def _shift(self) -> None:
        """Starts the next window, once all text is emitted, at the tokens that produced the end of it."""
        if self._num_settled < len(self._window):
            del self._window[: self._num_settled]
        self._num_settled = len(self._window)
        self._emitted = self._tokenizer.decode(self._window)

    def _cut(self, text: str) -> str:
        """Stops looking for a place where the text is complete, and continues from the last tokens."""
        delta = text[len(self._emitted) : _complete(text)]
        del self._window[:-_NUM_CONTEXT]
        self._num_settled = 0
        text = self._tokenizer.decode(self._window)
        self._emitted = text[: _complete(text)]
        return delta


def _complete(text: str) -> int:
    """Returns the length of `text` before an incomplete character at its end."""
    end = len(text)
    while end and len(text) - end < _MAX_TAIL and text[end - 1] == _REPLACEMENT:
        end -= 1
    return end


def _context(tokenizer: TokenDecoder, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
    """Returns the last tokens of a prompt, from a character boundary, and their text."""
    with_text = filter(tokenizer.has_text, reversed(prompt_token_ids[-4 * _NUM_CONTEXT :]))
    tail = list(islice(with_text, _NUM_CONTEXT + _MAX_TAIL))[::-1]
    for count in range(_NUM_CONTEXT, _NUM_CONTEXT + _MAX_TAIL + 1):
        window = tail[-count:]
        text = tokenizer.decode(window) if window else ""
        if not text.startswith(_REPLACEMENT):
            break
    return window, text
