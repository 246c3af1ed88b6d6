from dataclasses import dataclass, field

from hypothesis import given, strategies as st

from pdserve.router.planner_desk import Deed, Mode, PlannerDesk
from pdserve.router.planning import Advice, Bounds, Ratio, Window

EVEN, MORE_PREFILL = Ratio(2, 2), Ratio(3, 1)
BOUNDS = Bounds(Ratio(1, 1), Ratio(3, 3), 4)


def advice(number: int, to: Ratio | None = MORE_PREFILL, made_for: Ratio = EVEN) -> Advice:
    return Advice(number=number, at_s=0.0, made_for=made_for, to=to, reason="because", window=Window())


def desk(mode: Mode = Mode.AUTO) -> PlannerDesk:
    made = PlannerDesk()
    made.configure(mode, BOUNDS, EVEN)
    return made


def test_advice_is_followed_once() -> None:
    auto = desk()
    number = auto.number_summary()
    assert auto.receive(advice(number), 1.0, is_settled=True) == MORE_PREFILL
    assert auto.receive(advice(number), 1.0, is_settled=True) is None
    assert auto.num_changes == 1


def test_advice_mode_never_acts() -> None:
    advising = desk(Mode.ADVISE)
    for _ in range(3):
        assert advising.receive(advice(advising.number_summary()), 1.0, is_settled=True) is None
    (record,) = advising.records
    assert record.deed is Deed.ADVISED and advising.latest is not None


def test_advice_for_a_ratio_that_has_changed_is_late() -> None:
    auto = desk()
    number = auto.number_summary()
    auto.configure(Mode.AUTO, BOUNDS, Ratio(1, 3))
    assert auto.receive(advice(number), 1.0, is_settled=True) is None
    assert auto.records[-1].deed is Deed.LATE


def test_advice_is_late_even_when_its_ratio_is_in_force_again() -> None:
    auto = desk()
    number = auto.number_summary()
    auto.configure(Mode.AUTO, BOUNDS, Ratio(1, 3))
    auto.configure(Mode.AUTO, BOUNDS, EVEN)
    assert auto.receive(advice(number), 1.0, is_settled=True) is None


def test_advice_is_late_while_workers_are_drained_or_start() -> None:
    auto = desk()
    assert auto.receive(advice(auto.number_summary()), 1.0, is_settled=False) is None
    assert auto.records[-1].deed is Deed.LATE


def test_a_ratio_outside_the_bounds_is_refused() -> None:
    auto = desk()
    for to in (Ratio(4, 0), Ratio(3, 3), Ratio(0, 0)):
        assert auto.receive(advice(auto.number_summary(), to), 1.0, is_settled=True) is None
        assert auto.records[-1].deed is Deed.REFUSED


def test_advice_from_summaries_that_were_never_made_is_ignored() -> None:
    auto = desk()
    assert (
        auto.receive(advice(7), 1.0, is_settled=True) is None
        and auto.receive(advice(-1), 1.0, is_settled=True) is None
    )
    assert not auto.records


def test_a_planner_that_is_off_is_not_heard() -> None:
    off = desk(Mode.OFF)
    assert off.receive(advice(off.number_summary()), 1.0, is_settled=True) is None and off.latest is None


def test_a_change_that_proves_impossible_is_on_record_as_refused() -> None:
    auto = desk()
    auto.receive(advice(auto.number_summary()), 1.0, is_settled=True)
    auto.refuse("no room", 2.0)
    assert (auto.records[-1].deed, auto.records[-1].reason, auto.num_changes) == (Deed.REFUSED, "no room", 0)


@dataclass
class _Oracle:
    """Advice that may still be followed, by number."""

    valid: set[int] = field(default_factory=set)


STEPS = st.lists(
    st.one_of(
        st.just("summary"),
        st.tuples(st.just("advice"), st.integers(0, 12), st.integers(0, 4), st.integers(0, 4)),
        st.tuples(st.just("apply"), st.integers(1, 3), st.integers(1, 3)),
    ),
    max_size=40,
)


@given(STEPS)
def test_no_order_of_events_acts_on_anything_but_fresh_allowed_advice(steps: list[object]) -> None:
    auto, oracle, ratio, num_summaries, newest = desk(), _Oracle(), EVEN, 0, -1
    for step in steps:
        match step:
            case "summary":
                auto.number_summary()
                oracle.valid.add(num_summaries)
                num_summaries += 1
            case ("advice", int(number), int(prefill), int(decode)):
                to = Ratio(prefill, decode)
                got = auto.receive(advice(number, to, ratio), 0.0, is_settled=True)
                may = number in oracle.valid and number > newest and BOUNDS.allow(to)
                assert (got == to) if may else (got is None)
                if number < num_summaries:
                    newest = max(newest, number)
                if got is not None:
                    ratio = got
                    auto.configure(Mode.AUTO, BOUNDS, ratio)
                    oracle.valid.clear()
            case ("apply", int(prefill), int(decode)):
                ratio = Ratio(prefill, decode)
                auto.configure(Mode.AUTO, BOUNDS, ratio)
                oracle.valid.clear()
