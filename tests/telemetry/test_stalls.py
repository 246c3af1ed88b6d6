"""The longest stall of the head's loop, on a clock that the tests set."""

from pdserve.telemetry.stalls import BEAT_S, WINDOW_S, LoopStalls


def test_the_longest_stall_is_shown_for_a_window_only() -> None:
    stalls, now_s = LoopStalls(0.0), 0.0
    seen: list[float] = []
    for late_s in (0.0, 0.25, 0.1, *([0.0] * int(2 * WINDOW_S / BEAT_S + 20))):
        now_s = stalls.due_s + late_s
        stalls.beat(now_s)
        seen.append(round(stalls.longest_s(now_s), 6))
    assert seen[:3] == [0.0, 0.25, 0.25]
    assert set(seen[3 : int(WINDOW_S / BEAT_S)]) == {0.25}
    assert seen[-1] < 1e-6


def test_a_stall_that_has_not_ended_is_shown() -> None:
    stalls = LoopStalls(0.0)
    stalls.beat(0.0)
    assert stalls.longest_s(BEAT_S + 3.0) == 3.0
