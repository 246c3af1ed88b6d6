"""Items that wait for a time of their own."""

from hypothesis import given, strategies as st

from pdserve.router.timetable import Timetable

TIMES = st.none() | st.floats(0.0, 10.0)


@given(st.lists(st.tuples(st.integers(0, 5), TIMES), max_size=300), st.floats(0.0, 10.0))
def test_due_items_come_soonest_first_each_with_its_last_time(
    puts: list[tuple[int, float | None]], now_s: float
) -> None:
    timetable: Timetable[int] = Timetable()
    expected: dict[int, float] = {}
    for item, at_s in puts:
        timetable.put(item, at_s)
        expected.pop(item, None)
        if at_s is not None:
            expected[item] = at_s
    assert timetable.next_s() == min(expected.values(), default=None)
    due = timetable.pop_due(now_s)
    assert [expected[item] for item in due] == sorted(at_s for at_s in expected.values() if at_s <= now_s)
    assert set(timetable) == {item for item, at_s in expected.items() if at_s > now_s}
    assert timetable.pop_due(now_s) == []


def test_items_of_the_same_time_come_in_their_order() -> None:
    timetable: Timetable[str] = Timetable()
    for item in ("a", "b", "c"):
        timetable.put(item, 1.0)
    timetable.discard("b")
    timetable.put("b", 1.0)
    assert timetable.pop_due(1.0) == ["a", "c", "b"]


def test_entries_that_are_out_of_date_do_not_accumulate() -> None:
    timetable: Timetable[str] = Timetable()
    for number in range(10_000):
        timetable.put("a", float(number))
    assert len(timetable._heap) < 100
