"""Decides whether a tokenizer is fast on any short text: derived from its parts, compared with those of usual
checkpoints.

The sample texts of the loading process cannot reveal every slow case of an expression. So only known
expressions, none of which backtracks for longer than its text, may run on the server's loop.
"""

import msgspec

from ....core.errors import CheckpointError
from .growth import Parts, check_text_growth

MAX_TEXT_GROWTH = 16
MAX_PARTS = 8
MAX_SEARCHED_CHARS = 16  # of a plain text: a search may compare all of it at each position
MAX_WORD_CHARS = 100  # WordPiece's work grows with its square

_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_EXPRESSIONS = frozenset(
    (
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3
        rf"{_SHORT_FORMS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_SPACES}",
        # Qwen 2 to 3, and 3.5
        rf"{_SHORT_FORMS}|{_BEFORE}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_SPACES}",
        rf"{_SHORT_FORMS}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # Mistral's Tekken
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}",
        # GPT-4o
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT_FORMS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT_FORMS}?|\p{{N}}{{1,3}}"
        rf"|{_SIGNS}[\r\n/]*|{_SPACES}",
        # parts of several
        r"\p{N}",
        r"\p{N}{1,3}",
        r"\s+",
        " {2,}",
    )
)


def may_stall(backend_json: str) -> bool:
    """Returns whether even a short text may take the tokenizer noticeably long, so that it must not run on a
    loop."""
    parts = msgspec.json.decode(backend_json, type=Parts)
    try:
        check_text_growth(parts, MAX_TEXT_GROWTH, MAX_PARTS)
    except CheckpointError:
        return True
    return parts.model.max_input_chars_per_word > MAX_WORD_CHARS or any(
        text not in _EXPRESSIONS if kind == "Regex" else len(text) > MAX_SEARCHED_CHARS
        for pattern in parts.searched()
        for kind, text in pattern.items()
    )
