"""Clients are costly by the CPU time of long jobs, and not permanently."""

from hypothesis import given, strategies as st

from pdserve.grammar.costs import ALLOWED_S, CHEAP_S, FORGIVEN, MAX_CLIENTS, MAX_DEBT_S, ClientCosts


def test_cheap_jobs_make_nobody_costly_however_many_there_are() -> None:
    costs = ClientCosts()
    assert not any(costs.charge("me", CHEAP_S, 0.0) for _ in range(10_000))
    assert not costs.is_costly("me", 0.0)


def test_long_jobs_make_their_client_costly_once_and_nobody_else() -> None:
    costs = ClientCosts()
    assert [costs.charge("me", ALLOWED_S / 2, 0.0) for _ in range(5)] == [False, False, True, False, False]
    assert costs.is_costly("me", 0.0) and not costs.is_costly("other", 0.0)


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=50))
def test_a_client_is_forgiven_a_fixed_time_after_its_last_long_job(jobs: list[float]) -> None:
    costs = ClientCosts()
    for job_s in jobs:
        costs.charge("me", job_s, 10.0)
    assert not costs.is_costly("me", 10.0 + (MAX_DEBT_S - ALLOWED_S) / FORGIVEN + 1e-6)


def test_clients_without_a_debt_are_forgotten() -> None:
    costs = ClientCosts()
    for number in range(10 * MAX_CLIENTS):
        costs.charge(f"client{number}", 2 * CHEAP_S, number * 1.0)
        assert len(costs._debts) <= MAX_CLIENTS + 1
