"""The model that comes with the package, for `model: embedded`: a checkpoint directory like any other, read
from disk."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
