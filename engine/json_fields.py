"""Typed access to the fields of a checkpoint's JSON files; errors name the field that is missing or of
another type."""

from collections.abc import Mapping
from typing import Any

from ..core.checkpoint_files import shown
from ..core.errors import CheckpointError

MAX_INT = 2**31 - 1  # kernels count in 32 bits
MAX_INTS = 256
MAX_FLOAT = 1e30  # results computed from numbers up to this one neither overflow nor vanish


class JsonFields:
    """Reads `values`, a JSON object that `source` describes in messages. Null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """Returns the error to raise for field `name`."""
        if self.values.get(name) is None:
            return CheckpointError(f"{self.source}: {name} is missing, expected {expected}")
        return CheckpointError(f"{self.source}: {name}: got {shown(self.values[name])}, expected {expected}")

    def optional_int(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INT:
            raise self.refuse(name, f"an integer from 0 to {MAX_INT}")
        return value

    def positive_int(self, name: str, default: int | None = None, maximum: int = MAX_INT) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
            raise self.refuse(name, f"a positive integer, at most {maximum}")
        return value

    def optional_float(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -MAX_FLOAT <= value <= MAX_FLOAT
        ):
            raise self.refuse(name, f"a number from {-MAX_FLOAT:g} to {MAX_FLOAT:g}")
        return float(value)

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.optional_float(name)
        value = default if value is None else value
        if value is None or value < 1 / MAX_FLOAT:
            raise self.refuse(name, "a positive number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def optional_str(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def ints(self, name: str) -> tuple[int, ...]:
        """Returns a field that is an integer, a list of integers, or absent."""
        value = self.values.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(
            isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= MAX_INT for item in items
        ):
            raise self.refuse(name, "an integer or a list of integers")
        if len(items) > MAX_INTS:
            raise self.refuse(name, f"an integer or a list of integers, at most {MAX_INTS} of them")
        return tuple(items)
