from pdserve.cli.planner import as_lines
from pdserve.gateway.planner_report import planner_report
from pdserve.router.planner_desk import Deed, DeskRecord, Mode, PlannerDesk, PlannerState
from pdserve.router.planning import Advice, Candidate, Check, Ratio, Window
from tests.planner.live_support import terms

EVEN, MORE_PREFILL = Ratio(2, 2), Ratio(3, 1)


def state(advice: Advice | None) -> PlannerState:
    record = DeskRecord(at_s=40.0, made_for=EVEN, to=MORE_PREFILL, deed=Deed.CHANGED, reason="better")
    return PlannerState(
        mode=Mode.AUTO, terms=terms(), advice=advice, records=(record,), num_changes=1, now_s=100.0
    )


def test_a_planner_that_is_off_says_so() -> None:
    assert as_lines(planner_report(PlannerState())) == ["planner: off"]


def test_the_bounds_are_shown_before_any_decision() -> None:
    heading, rest, *_ = as_lines(planner_report(state(None)))
    assert "auto, for goodput over 30 s; 1P1D to 3P3D, at most 4 instances; 1 changes" in heading
    assert rest == "no decision yet"


def test_changes_of_the_last_hour_are_shown_while_the_planner_is_off() -> None:
    desk = PlannerDesk()
    desk.applied(EVEN, Ratio(1, 3), 10.0)
    desk.applied(Ratio(1, 3), MORE_PREFILL, 3700.0)
    lines = as_lines(planner_report(PlannerState(records=tuple(desk.records), now_s=3712.0)))
    assert lines == [
        "planner: off",
        "",
        "AGE   CHANGE         WHAT",
        "12s   1P3D -> 3P1D    applied: by an operator",
    ]


def test_a_decision_is_shown_with_candidates_checks_and_deeds() -> None:
    advice = Advice(
        number=4,
        at_s=88.0,
        made_for=EVEN,
        to=MORE_PREFILL,
        reason="3P1D brings more",
        window=Window(num_requests=70, rate=5.0, forecast_rate=6.0, num_clients=2),
        candidates=(
            Candidate(ratio=MORE_PREFILL, goodput=5.5, attainment=0.92, gain=100.0, cost=1.5),
            Candidate(ratio=EVEN, goodput=2.5, attainment=0.42, gain=0.0, cost=0.0, is_screened_out=True),
        ),
        trust=0.9,
        checks=(Check(from_s=10.0, until_s=40.0, ratio=EVEN, predicted=5.0, came=4.5),),
    )
    text = "\n".join(as_lines(planner_report(state(advice))))
    for part in (
        "5 requests/s, 6 expected",
        "12s ago, at 2P2D: 3P1D: 3P1D brings more",
        "trust: 90%",
        "3P1D      5.5      92%   100       1.5",
        "2P2D      2.5      42%   0         0  (given up)",
        "1m    2P2D      5          4.5",
        "2P2D -> 3P1D    changed: better",
    ):
        assert part in text, text
