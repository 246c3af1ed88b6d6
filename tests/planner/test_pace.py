from pdserve.planner.pace import MAX_SAVED_S, SHARE, Pace


def test_decisions_take_their_share_of_a_core_in_the_mean() -> None:
    pace, spent_s = Pace(), 0.0
    for now_s in range(10_000):
        if pace.allows(float(now_s)):
            pace.spend(3.0)
            spent_s += 3.0
    assert SHARE * 10_000 < spent_s < SHARE * 10_000 + MAX_SAVED_S + 3.0


def test_a_load_that_turns_finds_time_saved() -> None:
    pace = Pace()
    pace.allows(0.0)
    pace.spend(MAX_SAVED_S + 1.0)
    assert not pace.allows(19.0)
    assert pace.allows(1000.0)
    pace.spend(MAX_SAVED_S - 0.1)
    assert pace.allows(1000.0)
