"""Errors show the values that they are about, in bounded length and time."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.core.errors import MAX_SHOWN_CHARS, InvalidRequest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet="ab\n", max_size=99),
    lambda inner: (
        st.lists(inner, max_size=9) | st.dictionaries(st.text(alphabet="ab", max_size=9), inner, max_size=9)
    ),
)


@given(VALUES)
def test_a_value_is_shown_by_the_beginning_of_its_repr(value: Any) -> None:
    whole = repr(value)
    shown = whole if len(whole) <= MAX_SHOWN_CHARS else whole[: MAX_SHOWN_CHARS - 3] + "..."
    assert str(InvalidRequest("field", value, "x")) == f"field: {shown} is not valid, expected x"


class Unshown:
    def __repr__(self) -> str:
        raise AssertionError("this is far behind what is shown")


@pytest.mark.parametrize("value", [["a" * 100, Unshown()], {"a" * 100: Unshown()}, [[[1] * 100, Unshown()]]])
def test_values_beyond_the_shown_part_are_not_inspected(value: Any) -> None:
    assert "..." in str(InvalidRequest("field", value, "x"))


def test_an_error_is_the_same_when_it_is_restored() -> None:
    error = InvalidRequest("field", [1], "a text")
    again = InvalidRequest.of(error.problems, error.reason)
    assert (str(again), again.field, again.expected) == (str(error), "field", "a text")
