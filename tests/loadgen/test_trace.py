"""The Azure LLM inference trace is read as it is published."""

import pytest

from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.trace import TraceRow, parse_trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"

MOONCAKE = '{"timestamp": 2000, "input_length": 700, "output_length": 52, "hash_ids": [0, 14]}'


def test_the_2023_trace_has_seven_digits_and_no_zone() -> None:
    rows = parse_trace([HEAD, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"])
    assert rows == [TraceRow(0.0, 374, 44), TraceRow(pytest.approx(4.314579), 396, 109)]  # type: ignore[arg-type]


def test_the_2024_trace_has_a_zone_and_may_lack_fractions() -> None:
    rows = parse_trace([HEAD, "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:01+00:00,2399,6"])
    assert [row.offset_s for row in rows] == [0.0, pytest.approx(0.99007)]


def test_further_columns_are_ignored() -> None:
    lines = ["\ufeffModel," + HEAD, "x,2023-11-16 18:15:46,1,0", "y,2023-11-16 18:15:50,3,4"]
    assert parse_trace(lines) == [TraceRow(0.0, 1, 1), TraceRow(4.0, 3, 4)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["TIMESTAMP,ContextTokens"], "no column GeneratedTokens"),
        ([HEAD], "no request"),
        ([HEAD, "2023-11-16 18:15:46,1,2", "soon,1,2"], "line 3"),
        ([HEAD, "2023-11-16 18:15:46,1"], "line 2 of the trace: GeneratedTokens is missing"),
        ([HEAD, "2023-11-16 18:15:46,,2"], "line 2 of the trace: ContextTokens is missing"),
        (
            [HEAD, "2023-11-16 18:15:50,3,4", "2023-11-16 18:15:46,1,2"],
            "line 3 of the trace: its time is before",
        ),
        ([MOONCAKE.replace("0", "9", 1), MOONCAKE], "line 2 of the trace: its time is before"),
        ([HEAD, "2023-11-16 18:15:46,1," + "2" * 200_000], "line 1 of the trace: field larger"),
        ([HEAD, "2023-11-16 18:15:46,-1,2"], "line 2"),
        ([HEAD, "2023-11-16 18:15:46,1,2", "2023-11-16 18:15:46+00:00,1,2"], "time zone"),
        (['{"timestamp": 0, "input_length": 1}'], "line 1 of the trace: .*output_length"),
        ([MOONCAKE, MOONCAKE.replace("700", "-7")], "line 2 of the trace: .*input_length"),
        ([MOONCAKE.replace("700", "512")], "2 hash_ids, expected 1, one for each 512 tokens"),
    ],
)
def test_a_broken_trace_is_refused_with_its_place(lines: list[str], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse_trace(lines)


def test_mooncakes_rows_carry_the_identities_of_their_blocks() -> None:
    later = MOONCAKE.replace("2000", "2500").replace("[0, 14]", "[0, 3]")
    assert parse_trace([MOONCAKE, later]) == [
        TraceRow(0.0, 700, 52, (0, 14)),
        TraceRow(0.5, 700, 52, (0, 3)),
    ]
