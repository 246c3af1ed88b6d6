"""Finds stop strings in streamed text, and holds back no more than a possible beginning of one.

Knuth, Morris, Pratt, "Fast pattern matching in strings" (1977): one step per character and string, however
the text is split."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pattern:
    """A stop string; `borders[i]` is the length of the longest proper border of its first i + 1
    characters."""

    text: str
    borders: tuple[int, ...]

    @staticmethod
    def compile(text: str) -> "Pattern":
        assert text, "an empty stop string"
        borders, length = [0], 0
        for char in text[1:]:
            while length and text[length] != char:
                length = borders[length - 1]
            length += text[length] == char
            borders.append(length)
        return Pattern(text, tuple(borders))

    def advance(self, matched: int, char: str) -> int:
        """Returns how many characters are matched after `char`, if `matched` were before it."""
        while matched and self.text[matched] != char:
            matched = self.borders[matched - 1]
        return matched + (self.text[matched] == char)


class StopMatcher:
    """Watches the text of one choice. The stop string that completes first wins; of several, the longest."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        self._matched = [0] * len(patterns)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Returns the text that may be sent: before a stop string, and before what may become one. Empty once
        one is `found`."""
        if not self._patterns or self.found is not None:
            return text if self.found is None else ""
        for end, char in enumerate(text, start=1):
            self._matched = [p.advance(m, char) for p, m in zip(self._patterns, self._matched, strict=True)]
            complete = [
                p.text for p, m in zip(self._patterns, self._matched, strict=True) if m == len(p.text)
            ]
            if complete:
                self.found = max(complete, key=len)
                seen = self._held + text[:end]
                self._held = ""
                return seen[: -len(self.found)]
        seen = self._held + text
        certain = len(seen) - max(self._matched)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """Returns the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held
