"""The benchmark's measurements and their file format; shared by every engine and every interpreter.

Standard library only: peers run in environments that have none of our dependencies.
"""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """One row of the table: `batch_size` prompts of `num_prompt_tokens`, each continued by
    `num_new_tokens`."""

    name: str
    phase: Literal["prefill", "decode"]
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int


CASES = (
    Case("prefill-1024", "prefill", batch_size=1, num_prompt_tokens=1024, num_new_tokens=1),
    Case("decode-1", "decode", batch_size=1, num_prompt_tokens=128, num_new_tokens=64),
    Case("decode-8", "decode", batch_size=8, num_prompt_tokens=128, num_new_tokens=64),
    Case("decode-32", "decode", batch_size=32, num_prompt_tokens=128, num_new_tokens=64),
)


@dataclass(frozen=True)
class CellResult:
    """One engine's figure for one cell (shape, dtype, case). `variant` is the engine's way of doing it."""

    engine: str
    variant: str
    shape: str
    dtype: str
    num_threads: int
    case: str
    repeats_tokens_per_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.repeats_tokens_per_s)

    @property
    def best_tokens_per_s(self) -> float:
        """The engine's throughput where other processes disturb some of the repeats."""
        return max(self.repeats_tokens_per_s)

    @property
    def cell(self) -> tuple[str, str, str]:
        return (self.shape, self.dtype, self.case)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_s": round(self.tokens_per_s, 2)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CellResult":
        fields = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"repeats_tokens_per_s": tuple(value["repeats_tokens_per_s"])})


def pool_repeats(results: Iterable[CellResult]) -> list[CellResult]:
    """One result per (engine, variant, threads, cell), holding all its repeats: for rounds that were
    interleaved."""
    pooled: dict[CellResult, tuple[float, ...]] = {}
    for result in results:
        key = replace(result, repeats_tokens_per_s=())
        pooled[key] = pooled.get(key, ()) + result.repeats_tokens_per_s
    return [replace(key, repeats_tokens_per_s=repeats) for key, repeats in pooled.items()]


def best_variants(results: Iterable[CellResult]) -> list[CellResult]:
    """The fastest variant of each engine in each cell."""
    best: dict[tuple[str, int, tuple[str, str, str]], CellResult] = {}
    for result in results:
        key = (result.engine, result.num_threads, result.cell)
        if key not in best or result.tokens_per_s > best[key].tokens_per_s:
            best[key] = result
    return list(best.values())
