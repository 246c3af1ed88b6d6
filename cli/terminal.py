"""Output in which nothing that came from a server or a model acts on the terminal."""

import re
import sys
from typing import TextIO

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # all but tabs and line ends


def harmless(text: str) -> str:
    """Returns the text with control characters, and those that reorder text, spelt out."""
    return _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text)


def show(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Prints and flushes; on a terminal only what is harmless."""
    stream = file or sys.stdout
    stream.write((harmless(text) if stream.isatty() else text) + end)
    stream.flush()
