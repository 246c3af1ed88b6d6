"""The same seed gives the same workload; prompts share exactly the configured prefixes."""

from itertools import islice

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.loadgen.arrivals import Poisson
from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.lengths import Fixed, LogNormal, Uniform
from pdserve.loadgen.trace import TraceRow
from pdserve.loadgen.workload import Drawn, Prompts, Replayed, ScheduledRequest, SharedPrefixes, limited

DRAWN = Drawn(Poisson(4.0), LogNormal(100, 0.8), Uniform(1, 50))
ROWS = [TraceRow(0.0, 100, 10), TraceRow(2.0, 5000, 900), TraceRow(6.0, 30, 20)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 50))
def test_a_seed_and_a_round_give_the_same_jobs_and_prompts(seed: int, index: int) -> None:
    first, second = (list(islice(DRAWN.jobs(seed, index), 20)) for _ in range(2))
    assert first == second
    assert first != list(islice(DRAWN.jobs(seed, index + 1), 20))
    assert first != list(islice(DRAWN.jobs(seed + 1, index), 20))
    prompts = [Prompts(seed, 3, 1000).token_ids(job, index) for job in first]
    assert prompts == [Prompts(seed, 3, 1000).token_ids(job, index) for job in reversed(second)][::-1]


def test_prompts_are_unique_across_jobs_rounds_targets_and_warm_up() -> None:
    jobs = [ScheduledRequest(index, 0.0, 16, 1) for index in range(20)]
    targets = [Prompts(7, 3, 1000, salt=salt) for salt in range(2)]
    prompts = [
        tuple(target.token_ids(job, index)) for target in targets for job in jobs for index in range(3)
    ]
    prompts += [tuple(target.warm_up(index, 16)) for target in targets for index in range(20)]
    assert len(set(prompts)) == len(prompts)


def test_prompts_have_their_length_and_only_allowed_ids() -> None:
    token_ids = Prompts(0, 3, 10, excluded=(4, 7)).token_ids(ScheduledRequest(0, None, 500, 1), 0)
    assert len(token_ids) == 500
    assert set(token_ids) == {3, 5, 6, 8, 9}
    with pytest.raises(LoadError, match="no token id is left"):
        Prompts(0, 3, 5, excluded=(3, 4))


def test_prompts_of_one_group_share_exactly_their_prefix() -> None:
    prefixes = SharedPrefixes(num_groups=3, num_tokens=40)
    jobs = list(islice(Drawn(None, Fixed(8), Fixed(1), prefixes).jobs(0, 0), 60))
    prompts = Prompts(0, 3, 1000, prefixes=prefixes)
    seen: dict[int | None, set[tuple[int, ...]]] = {}
    for job in jobs:
        token_ids = tuple(prompts.token_ids(job, 0))
        assert len(token_ids) == job.num_prompt_tokens == 48
        seen.setdefault(job.group, set()).add(token_ids[:40])
    assert set(seen) == {0, 1, 2}
    assert all(len(heads) == 1 for heads in seen.values())
    assert len(set.union(*seen.values())) == 3
    assert len({tuple(prompts.token_ids(job, 0)[40:]) for job in jobs}) == len(jobs)


def test_a_closed_load_has_no_instants() -> None:
    assert next(Drawn(None, Fixed(1), Fixed(1)).jobs(0, 0)).due_s is None
    assert [job.due_s for job in Replayed(ROWS, is_open=False).jobs(0, 0)] == [None, None, None]


def test_a_trace_is_replayed_at_its_speed_and_truncated() -> None:
    jobs = list(Replayed(ROWS, speed=4.0, max_prompt_tokens=1000, max_output_tokens=100).jobs(0, 0))
    assert jobs == [
        ScheduledRequest(0, 0.0, 100, 10),
        ScheduledRequest(1, 0.5, 1000, 100),
        ScheduledRequest(2, 1.5, 30, 20),
    ]


def test_a_load_ends_with_its_requests_or_its_time() -> None:
    assert len(list(limited(DRAWN.jobs(0, 0), 7, None))) == 7
    within = list(limited(DRAWN.jobs(0, 0), None, 5.0))
    assert all(job.due_s is not None and job.due_s < 5.0 for job in within)
    following = next(islice(DRAWN.jobs(0, 0), len(within), None)).due_s
    assert following is not None and following >= 5.0


def test_prompts_of_a_trace_share_the_blocks_that_it_says() -> None:
    rows = [TraceRow(0.0, 1000, 1, (1, 2)), TraceRow(1.0, 1000, 1, (1, 3))]
    prompts = Prompts(0, 0, 50_000)
    first, second = (prompts.token_ids(job, 0) for job in Replayed(rows).jobs(0, 0))
    assert (len(first), len(second)) == (1000, 1000)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]
    assert Prompts(1, 0, 50_000).token_ids(next(Replayed(rows).jobs(0, 0)), 0)[:512] != first[:512]
