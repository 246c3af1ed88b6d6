"""Decides whether a tokenizer is fast on any short text: derived from its parts, compared with those of usual
checkpoints.

The sample texts of the loading process cannot reveal every slow case of an expression. So only known
expressions, none of which backtracks for longer than its text, may run on the server's loop.
"""

import msgspec

from ....core.errors import CheckpointError
from ....core.gguf_tokenizer import BEFORE, LLAMA3, LOWER, QWEN2, SHORT_FORMS, SIGNS, SPACES, TEKKEN, UPPER
from .growth import Parts, check_text_growth

MAX_TEXT_GROWTH = 16
MAX_PARTS = 8
MAX_SEARCHED_CHARS = 16  # of a plain text: a search may compare all of it at each position
MAX_WORD_CHARS = 100  # WordPiece's work grows with its square

_EXPRESSIONS = frozenset(
    (
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        LLAMA3,
        QWEN2,  # and Qwen 3
        # Qwen 3.5
        rf"{SHORT_FORMS}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
        TEKKEN,
        # GPT-4o
        rf"{BEFORE}{UPPER}*{LOWER}+{SHORT_FORMS}?|{BEFORE}{UPPER}+{LOWER}*{SHORT_FORMS}?|\p{{N}}{{1,3}}"
        rf"|{SIGNS}[\r\n/]*|{SPACES}",
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
