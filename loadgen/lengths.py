"""The numbers of tokens in prompts and outputs: distributions over whole numbers from 1 on, and their
notation.

512                                       always
uniform:min=64,max=512                    both ends included
lognormal:mean=512,cv=0.8,min=16,max=2048 mean and coefficient of variation, then clipped to min and max
file:PATH                                 one number a line; drawn with equal probability
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

import numpy as np

from .errors import LoadError

ReadText = Callable[[str], str]  # path -> content


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: np.random.Generator) -> int: ...

    @property
    def longest(self) -> int | None:
        """The largest possible length; None: unbounded."""
        ...


@dataclass(frozen=True)
class Fixed:
    tokens: int

    def draw(self, rng: np.random.Generator) -> int:
        return self.tokens

    @property
    def longest(self) -> int | None:
        return self.tokens


@dataclass(frozen=True)
class Uniform:
    """Each number from `low` to `high`, both included, is equally probable."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))

    @property
    def longest(self) -> int | None:
        return self.high


@dataclass(frozen=True)
class LogNormal:
    """Rounded, then clipped to [low, high], which moves the mean where much is clipped."""

    mean: float
    cv: float
    low: int = 1
    high: int | None = None

    def draw(self, rng: np.random.Generator) -> int:
        variance = log(1 + self.cv**2)
        drawn = float(rng.lognormal(log(self.mean) - variance / 2, variance**0.5))
        tokens = max(self.low, round(drawn))
        return tokens if self.high is None else min(self.high, tokens)

    @property
    def longest(self) -> int | None:
        return self.high


@dataclass(frozen=True)
class Empirical:
    """Each of the given numbers is equally probable."""

    values: tuple[int, ...]

    def draw(self, rng: np.random.Generator) -> int:
        return self.values[int(rng.integers(len(self.values)))]

    @property
    def longest(self) -> int | None:
        return max(self.values)


def parse_lengths(text: str, read: ReadText) -> Lengths:
    """Parses the notation above. Raises LoadError."""
    kind, _, rest = text.partition(":")
    try:
        match kind:
            case "file" if rest:
                return Empirical(_values(read(rest).split()))
            case "fixed":
                return Fixed(_positive(rest))
            case "uniform":
                options = _options(rest, ("min", "max"))
                return _ordered(Uniform(_positive(options["min"]), _positive(options["max"])))
            case "lognormal":
                return _log_normal(_options(rest, ("mean", "cv", "min", "max")))
        return Fixed(_positive(text))
    except (ValueError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LoadError(
            f"{text!r} is not a length ({reason}), expected such as 512, uniform:min=64,max=512, "
            "lognormal:mean=512,cv=0.8,max=2048 or file:PATH"
        ) from error


def _log_normal(options: dict[str, str]) -> Lengths:
    mean, cv = float(options["mean"]), float(options["cv"])
    if not (0 < mean < float("inf") and 0 <= cv < float("inf")):
        raise ValueError("mean must be above 0, cv 0 or above")
    low = _positive(options.get("min", "1"))
    high = _positive(options["max"]) if "max" in options else None
    if high is not None and high < low:
        raise ValueError("max is below min")
    return LogNormal(mean, cv, low, high)


def _ordered(lengths: Uniform) -> Uniform:
    if lengths.high < lengths.low:
        raise ValueError("max is below min")
    return lengths


def _options(text: str, known: Sequence[str]) -> dict[str, str]:
    options = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"{name!r} is not known")
        options[name] = value
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is below 1")
    return value


def _values(words: Sequence[str]) -> tuple[int, ...]:
    if not words:
        raise ValueError("the file holds no number")
    return tuple(map(_positive, words))
