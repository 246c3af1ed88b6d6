"""The order of waiting jobs, and what taking them out costs."""

import random

from pdserve.core.request import Request, SamplingParams
from pdserve.router.admission import JobQueue
from pdserve.router.front_jobs import FrontJobs
from pdserve.router.live_request import Job, LiveRequest


def job(name: str, *, client: str = "c", priority: int = 0, ready_s: float = 0.0) -> Job:
    request = Request(
        request_id=name,
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(),
        client=client,
        priority=priority,
    )
    made = Job(LiveRequest(request, 0.0), (0,), (), 0.0)
    made.ready_s = ready_s
    return made


def names(jobs: FrontJobs) -> list[str]:
    return [one.live.request_id for one in jobs]


def test_jobs_put_in_front_are_ahead_of_the_others_of_their_priority() -> None:
    front = FrontJobs()
    front.put_first([job("a"), job("low", priority=1), job("b")])
    front.put_first([job("c"), job("high", priority=-1), job("lower", priority=1)])
    assert names(front) == ["high", "c", "a", "b", "lower", "low"]
    assert len(front) == 6


def test_the_front_knows_each_clients_first_job() -> None:
    front = FrontJobs()
    jobs = [job("a1", client="a"), job("b1", client="b"), job("a2", client="a"), job("b2", client="b")]
    front.put_first(jobs)
    assert front.discard(jobs[0]) and not front.discard(jobs[0])
    assert sorted(one.live.request_id for one in front.firsts()) == ["a2", "b1"]


def test_a_job_is_found_wherever_it_waits() -> None:
    rng, queue = random.Random(0), JobQueue()
    jobs = [job(f"r{number}", client=f"c{number % 7}", priority=number % 3) for number in range(400)]
    for number, one in enumerate(jobs):
        one.ready_s = rng.choice([0.0, 5.0])
        (queue.push if number % 4 == 0 else lambda it: queue.push_front([it], 0.0))(one)
        if number % 50 == 0:
            queue.wake(0.0)
        if number % 11 == 0:
            queue.pass_head()
        if number % 13 == 0 and queue.head() is not None:
            queue.strand_head(0.0)
    rng.shuffle(jobs)
    for left, one in zip(range(len(jobs) - 1, -1, -1), jobs, strict=True):
        queue.remove(one)
        assert len(queue) == len(list(queue)) == left


def test_a_newcomer_starts_level_with_those_that_were_passed() -> None:
    queue = JobQueue()
    for client, num_had in (("a", 100.0), ("b", 300.0), ("c", 500.0)):
        queue.counters.charge(client, num_had)
        queue.push(job(client, client=client))
    for _ in range(2):
        queue.pass_head()
    queue.push(job("new", client="new"))
    assert queue.counters.of("new") == 100.0
    head = queue.head()
    assert head is not None and head.client == "new"
