from itertools import pairwise

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.hashing import block_hashes
from pdserve.loadgen.arrivals import Poisson
from pdserve.loadgen.lengths import Fixed, Uniform
from pdserve.loadgen.trace import TraceRow
from pdserve.loadgen.workload import Drawn, Replayed, SharedPrefixes
from pdserve.planner.offered_load import OfferedLoad

DRAWN = OfferedLoad(Drawn(Poisson(4.0), Uniform(10, 500), Uniform(1, 50)), 50)
TRACE = OfferedLoad(Replayed([TraceRow(float(i), 100 + i, 10) for i in range(101)]), 20)


def test_another_rate_stretches_the_gaps_and_changes_nothing_else() -> None:
    slow, fast = list(DRAWN.arrivals(4.0, 1)), list(DRAWN.arrivals(8.0, 1))
    assert [one.at_s for one in slow] == pytest.approx([2 * one.at_s for one in fast])
    assert [one.prompt_token_ids for one in slow] == [one.prompt_token_ids for one in fast]
    assert [one.num_output_tokens for one in slow] == [one.num_output_tokens for one in fast]


def test_another_seed_draws_other_requests() -> None:
    assert [one.at_s for one in DRAWN.arrivals(4.0, 1)] != [one.at_s for one in DRAWN.arrivals(4.0, 2)]


def test_a_trace_has_its_own_rate_and_is_stretched_to_others() -> None:
    assert TRACE.rate == pytest.approx(1.01)
    own, double = list(TRACE.arrivals(TRACE.rate, 0)), list(TRACE.arrivals(2 * TRACE.rate, 0))
    assert [one.at_s for one in own] == pytest.approx([float(i) for i in range(20)])
    assert [one.at_s for one in double] == pytest.approx([i / 2 for i in range(20)])


def test_each_seed_takes_another_part_of_a_trace() -> None:
    parts = [[len(one.prompt_token_ids) for one in TRACE.arrivals(1.0, seed)] for seed in range(3)]
    assert parts == [list(range(100 + 20 * seed, 120 + 20 * seed)) for seed in range(3)]
    assert next(TRACE.arrivals(1.0, 2)).at_s == 0.0


def test_a_trace_without_a_duration_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 requests at one instant"):
        _ = OfferedLoad(Replayed([TraceRow(0.0, 1, 1)] * 2), 2).rate


def test_prompts_share_what_the_workload_says_and_nothing_else() -> None:
    load = OfferedLoad(
        Drawn(Poisson(1.0), Fixed(64), Fixed(1), SharedPrefixes(num_groups=2, num_tokens=128)), 8
    )
    chains = [tuple(block_hashes(one.prompt_token_ids, 64)) for one in load.arrivals(1.0, 0)]
    assert all(len(chain) == 3 for chain in chains)
    assert len({chain[:2] for chain in chains}) == 2
    assert len({chain[2] for chain in chains}) == 8


def test_blocks_of_a_trace_are_equal_where_their_identities_are() -> None:
    rows = [TraceRow(0.0, 1024, 1, (3, 4)), TraceRow(1.0, 700, 1, (3, 9))]
    first, second = (
        block_hashes(one.prompt_token_ids, 512) for one in OfferedLoad(Replayed(rows), 2).arrivals(1.0, 0)
    )
    assert first[0] == second[0]
    assert (len(first), len(second)) == (2, 1)


def test_the_longest_request_counts_prompt_and_output() -> None:
    assert TRACE.longest == 119 + 10
    assert all(later.at_s >= earlier.at_s for earlier, later in pairwise(DRAWN.arrivals(4.0, 0)))
