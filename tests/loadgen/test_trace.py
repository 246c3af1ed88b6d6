"""The Azure LLM inference trace is read as it is published."""

import pytest

from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.trace import TraceRow, parse_trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_the_2023_trace_has_seven_digits_and_no_zone() -> None:
    rows = parse_trace([HEAD, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"])
    assert rows == [TraceRow(0.0, 374, 44), TraceRow(pytest.approx(4.314579), 396, 109)]  # type: ignore[arg-type]


def test_the_2024_trace_has_a_zone_and_may_lack_fractions() -> None:
    rows = parse_trace([HEAD, "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:01+00:00,2399,6"])
    assert [row.offset_s for row in rows] == [0.0, pytest.approx(0.99007)]


def test_rows_are_put_in_order_and_further_columns_ignored() -> None:
    lines = ["\ufeffModel," + HEAD, "x,2023-11-16 18:15:50,3,4", "y,2023-11-16 18:15:46,1,0"]
    assert parse_trace(lines) == [TraceRow(0.0, 1, 1), TraceRow(4.0, 3, 4)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["TIMESTAMP,ContextTokens"], "no column GeneratedTokens"),
        ([HEAD], "no request"),
        ([HEAD, "2023-11-16 18:15:46,1,2", "soon,1,2"], "line 3"),
        ([HEAD, "2023-11-16 18:15:46,1"], "line 2"),
        ([HEAD, "2023-11-16 18:15:46,-1,2"], "line 2"),
        ([HEAD, "2023-11-16 18:15:46,1,2", "2023-11-16 18:15:46+00:00,1,2"], "time zone"),
    ],
)
def test_a_broken_trace_is_refused_with_its_place(lines: list[str], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse_trace(lines)
