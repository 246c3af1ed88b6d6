"""The files of a run: the table, rewritten after every part, and each section's standard error."""

import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .report import Message, summary

_PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python")


@dataclass(frozen=True)
class Record:
    """Below `folder`: `DATE-gpu.txt` and `DATE-gpu-stderr/SECTION.txt`. A run on the same day overwrites
    them."""

    folder: Path
    command: str

    @property
    def table(self) -> Path:
        return self.folder / f"{date.today()}-gpu.txt"

    @property
    def stderr_folder(self) -> Path:
        folder = self.folder / f"{date.today()}-gpu-stderr"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, messages: list[Message], ending: str) -> str:
        """Returns the table; `ending` says how far the run is."""
        text = f"{summary(messages)}\n\n{ending}"
        self.table.write_text(f"{self.command}\n{date.today()}, {versions()}\n\n{text}\n")
        return text


def versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"
