"""Recorded traces of requests, in two formats.

Azure's LLM inference traces (github.com/Azure/AzurePublicDataset) are CSV:

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

Both the trace of 2023 (no time zone, seven digits of a second) and that of 2024 (with a time zone) are
understood; further columns are ignored.

Mooncake's (github.com/kvcache-ai/Mooncake) have a JSON object a line. Timestamps are in milliseconds; equal
hash_ids are equal blocks of 512 tokens behind equal ones:

    {"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [0, 14]}"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated

import msgspec

from .errors import LoadError

BLOCK_TOKENS = 512
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace."""

    offset_s: float  # since the first request of the trace
    num_prompt_tokens: int
    num_output_tokens: int
    # identities of the prompt's blocks, of BLOCK_TOKENS tokens but the last; empty: it shares none
    blocks: tuple[int, ...] = ()


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=0)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()


def parse_trace(lines: Sequence[str]) -> list[TraceRow]:
    """Returns the rows of either format; one without prompt or output counts as having one token. Raises
    LoadError, with the line's number, also where times go back."""
    is_json = bool(lines) and lines[0].lstrip("\ufeff").startswith("{")
    return _parse_mooncake(lines) if is_json else _parse_azure(lines)


def _parse_mooncake(lines: Iterable[str]) -> list[TraceRow]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    rows: list[TraceRow] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise LoadError(f"line {number} of the trace: {error}") from error
        if rows and row.timestamp / 1e3 < rows[-1].offset_s:
            raise _goes_back(number)
        num_blocks = -(-row.input_length // BLOCK_TOKENS)
        if row.hash_ids and len(row.hash_ids) != num_blocks:
            raise LoadError(
                f"line {number} of the trace: {len(row.hash_ids)} hash_ids, expected {num_blocks}, one for"
                f" each {BLOCK_TOKENS} tokens of input_length ({row.input_length})"
            )
        rows.append(
            TraceRow(row.timestamp / 1e3, max(1, row.input_length), max(1, row.output_length), row.hash_ids)
        )
    first_s = rows[0].offset_s
    return [replace(row, offset_s=row.offset_s - first_s) for row in rows]


def _parse_azure(lines: Iterable[str]) -> list[TraceRow]:
    reader = csv.DictReader(line.lstrip("\ufeff") for line in lines)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise LoadError(f"the trace has no column {missing[0]}, expected {','.join(COLUMNS)}")
    parsed: list[tuple[datetime, int, int]] = []
    for row in _rows(reader):
        for name in COLUMNS:
            if not row[name]:
                raise LoadError(f"line {reader.line_num} of the trace: {name} is missing")
        try:
            parsed.append(
                (datetime.fromisoformat(row[COLUMNS[0]]), _count(row[COLUMNS[1]]), _count(row[COLUMNS[2]]))
            )
        except (ValueError, TypeError) as error:
            raise LoadError(f"line {reader.line_num} of the trace: {error}") from error
        if len({at.tzinfo is None for at, _, _ in parsed[-2:]}) > 1:
            raise LoadError("some timestamps of the trace have a time zone and others have none")
        if len(parsed) > 1 and parsed[-1][0] < parsed[-2][0]:
            raise _goes_back(reader.line_num)
    if not parsed:
        raise LoadError("the trace holds no request")
    first = parsed[0][0]
    return [TraceRow((at - first).total_seconds(), prompt, output) for at, prompt, output in parsed]


def _rows(reader: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise LoadError(f"line {reader.line_num} of the trace: {error}") from error


def _goes_back(line_number: int) -> LoadError:
    return LoadError(f"line {line_number} of the trace: its time is before that of the row above it")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{value} is below 0")
    return max(1, value)
