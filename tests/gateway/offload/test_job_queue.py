"""The order of jobs."""

import pytest
from hypothesis import given, strategies as st

from pdserve.core.errors import QueueFull
from pdserve.gateway.offload.job_queue import IntakeQueue


def test_clients_take_turns_however_many_jobs_one_of_them_has() -> None:
    queue: IntakeQueue[str] = IntakeQueue()
    for index in range(3):
        queue.push("greedy", f"greedy {index}")
    queue.push("other", "other 0")
    assert [queue.pop() for _ in range(4)] == ["greedy 0", "other 0", "greedy 1", "greedy 2"]


def test_one_client_cannot_take_all_places() -> None:
    queue: IntakeQueue[int] = IntakeQueue(max_jobs=16, max_jobs_each=4)
    for index in range(4):
        queue.push("greedy", index)
    with pytest.raises(QueueFull) as refused:
        queue.push("greedy", 4)
    assert refused.value.limit == 4 and refused.value.retry_after_s > 0
    queue.push("other", 0)


def test_deferred_clients_wait_only_for_the_others() -> None:
    queue: IntakeQueue[str] = IntakeQueue()
    for client in ("a", "b", "a", "c"):
        queue.push(client, client)
    assert [queue.pop(after_others={"a", "b"}) for _ in range(4)] == ["c", "a", "b", "a"]


def test_the_last_places_are_for_clients_that_have_nothing_waiting() -> None:
    queue: IntakeQueue[int] = IntakeQueue(max_jobs=16, max_jobs_each=14)
    for index in range(14):
        queue.push("first", index)
    queue.push("second", 0)
    with pytest.raises(QueueFull) as refused:
        queue.push("second", 1)
    assert refused.value.limit == 14
    queue.push("third", 0)
    with pytest.raises(QueueFull) as refused:
        queue.push("fourth", 0)
    assert refused.value.limit == 16


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["push", "pop", "remove"])), max_size=60))
def test_each_job_is_done_once_in_its_clients_order(steps: list[tuple[str, str]]) -> None:
    queue: IntakeQueue[tuple[str, int]] = IntakeQueue()
    waiting: list[tuple[str, int]] = []
    for number, (client, step) in enumerate(steps):
        if step == "push":
            queue.push(client, (client, number))
            waiting.append((client, number))
        elif step == "pop" and waiting:
            job = queue.pop()
            assert job == next(other for other in waiting if other[0] == job[0])
            waiting.remove(job)
        elif step == "remove":
            job = next((other for other in waiting if other[0] == client), (client, -1))
            queue.remove(client, job)
            if job in waiting:
                waiting.remove(job)
        assert len(queue) == len(waiting)
