"""Traces with the columns of the Azure LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

Both the trace of 2023 (no time zone, seven digits of a second) and that of 2024 (with a time zone) are
understood; further columns are ignored. Source: github.com/Azure/AzurePublicDataset."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from .errors import LoadError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace."""

    offset_s: float  # since the first request of the trace
    num_prompt_tokens: int
    num_output_tokens: int


def parse_trace(lines: Iterable[str]) -> list[TraceRow]:
    """The rows by time; one without prompt or output counts as having one token. Raises LoadError, with the
    line's number."""
    reader = csv.DictReader(line.lstrip("\ufeff") for line in lines)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise LoadError(f"the trace has no column {missing[0]}, expected {','.join(COLUMNS)}")
    parsed: list[tuple[datetime, int, int]] = []
    for row in reader:
        try:
            parsed.append(
                (datetime.fromisoformat(row[COLUMNS[0]]), _count(row[COLUMNS[1]]), _count(row[COLUMNS[2]]))
            )
        except (ValueError, TypeError) as error:
            raise LoadError(f"line {reader.line_num} of the trace: {error}") from error
    if not parsed:
        raise LoadError("the trace holds no request")
    if len({at.tzinfo is None for at, _, _ in parsed}) > 1:
        raise LoadError("some timestamps of the trace have a time zone and others have none")
    parsed.sort(key=lambda row: row[0])
    first = parsed[0][0]
    return [TraceRow((at - first).total_seconds(), prompt, output) for at, prompt, output in parsed]


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{value} is below 0")
    return max(1, value)
