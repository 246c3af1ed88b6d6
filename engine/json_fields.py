"""Typed access to the fields of a checkpoint's JSON files; what is missing or of another type is refused by name."""

from collections.abc import Mapping
from typing import Any

from ..core.errors import CheckpointError


class JsonFields:
    """Reads `values`, a JSON object that `source` describes in messages. Null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """The error to raise for field `name`."""
        if self.values.get(name) is None:
            return CheckpointError(f"{self.source}: {name} is missing, expected {expected}")
        return CheckpointError(f"{self.source}: {name}: got {self.values[name]!r}, expected {expected}")

    def optional_int(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refuse(name, "an integer, 0 or greater")
        return value

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.optional_int(name)
        if value is None and name not in self.values:
            value = default
        if not value:
            raise self.refuse(name, "a positive integer")
        return value

    def optional_float(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "a number")
        return float(value)

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.optional_float(name)
        value = default if value is None else value
        if value is None or not 0 < value < float("inf"):
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
        """A field that is an integer, a list of integers, or absent."""
        value = self.values.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self.refuse(name, "an integer or a list of integers")
        return tuple(items)
