from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.core.messages import Role, StepTiming
from pdserve.loadgen.slo import Slo
from pdserve.planner.virtual_cluster import Arrival, ServedRequest, VirtualCluster

from .replay_support import DURATIONS, LAYOUT, NO_PREFILL_ON_DECODE, arrivals, cluster, shape


def prefill_s(num_tokens: int) -> float:
    return DURATIONS.prefill_step_s + DURATIONS.prefill_token_s * num_tokens + 1e-8 * num_tokens**2


def decode_s(context: int, num_sequences: int = 1) -> float:
    return DURATIONS.decode.step_s + 1e-6 * context + 1e-4 * num_sequences


def test_a_request_alone_takes_the_time_of_its_steps_and_its_transfer() -> None:
    (served,) = cluster(1, 1).serve(arrivals([(1.0, 400, 3)]))
    # the KV has left by the end of the step that computes it
    first_s = 1.0 + prefill_s(400)
    second_s = first_s + DURATIONS.transfer_s + decode_s(401)
    assert served.token_s == pytest.approx([first_s, second_s, second_s + decode_s(402)])
    assert served.is_complete


def test_a_narrow_link_delays_the_second_token_and_not_the_first() -> None:
    narrow = replace(DURATIONS, link_bytes_per_s=100 * LAYOUT.wire_bytes_per_token)
    (served,) = cluster(1, 1, durations=narrow).serve(arrivals([(0.0, 400, 2)]))
    assert served.token_s == pytest.approx([prefill_s(400), 4.0 + DURATIONS.transfer_s + decode_s(401)])


def test_one_pool_serves_both_phases_without_a_transfer() -> None:
    alone = cluster(0, 1)
    (served,) = alone.serve(arrivals([(0.0, 400, 2)]))
    assert served.token_s == pytest.approx([prefill_s(400), prefill_s(400) + decode_s(401)])
    assert alone.num_bytes_moved == 0


def test_a_prompt_beyond_a_steps_budget_is_computed_in_chunks() -> None:
    (served,) = cluster(1, 1).serve(arrivals([(0.0, 1000, 1)]))
    chunks_s = prefill_s(512) + DURATIONS.prefill_step_s + 1e-4 * 488 + 1e-8 * 488 * 1000
    assert served.token_s == pytest.approx([chunks_s])


def test_a_prompt_delays_the_tokens_of_those_that_share_its_step() -> None:
    """The interference that disaggregation avoids."""
    requests = arrivals([(0.0, 16, 40), (0.5, 500, 2)])
    together, _ = cluster(0, 1).serve(requests)
    apart, _ = cluster(1, 1).serve(requests)
    assert together.largest_gap_s is not None and apart.largest_gap_s is not None
    assert together.largest_gap_s > prefill_s(480)
    assert apart.largest_gap_s < 2 * decode_s(600, 2)


def test_a_shared_prefix_is_computed_once() -> None:
    prefix = (7,) * 320
    first, second = cluster(1, 1).serve(
        [Arrival(0.0, prefix + (1,) * 16, 2), Arrival(1.0, prefix + (2,) * 16, 2)]
    )
    assert first.ttft_s == pytest.approx(prefill_s(336))
    assert second.ttft_s is not None and second.ttft_s < prefill_s(100)


def test_the_same_workload_gives_the_same_instants() -> None:
    requests = arrivals([(0.01 * i, 50 + 37 * i % 300, 5 + i % 7) for i in range(40)])
    one, other = (cluster(2, 2).serve(requests) for _ in range(2))
    assert [request.token_s for request in one] == [request.token_s for request in other]


def test_a_request_that_no_instance_can_hold_fails_alone() -> None:
    small = cluster(1, 1, num_blocks=8)
    large, other = small.serve(arrivals([(0.0, 500, 4), (0.1, 50, 4)]))
    assert large.error is not None and not large.token_s
    assert large.misses(Slo(ttft=1.0)) == ["failed"]
    assert other.is_complete


def test_the_rest_is_left_unserved_once_enough_is_known() -> None:
    seen: list[ServedRequest] = []

    def is_enough(request: ServedRequest) -> bool:
        seen.append(request)
        return len(seen) == 2

    served = cluster(1, 1).serve(arrivals([(float(i), 16, 2) for i in range(10)]), is_enough)
    assert len(seen) == 2 and len(served) < 10


def test_a_mixed_step_reads_the_weights_once() -> None:
    step = StepTiming(
        num_prefill_tokens=100,
        sum_prefill_squares=10_000,
        num_decode_sequences=4,
        num_context_tokens=400,
        duration_s=0.0,
    )
    apart_s = prefill_s(100) + decode_s(400, 4)
    assert DURATIONS.step_s(step) == pytest.approx(apart_s - min(DURATIONS.prefill_step_s, 0.02))


REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 600), st.integers(1, 30)), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None)
@given(REQUESTS, st.integers(0, 2), st.integers(1, 2), st.sampled_from((50, 400)), st.booleans())
def test_every_request_gets_its_tokens_and_every_block_is_free_again(
    requests: list[tuple[float, int, int]],
    num_prefill: int,
    num_decode: int,
    num_blocks: int,
    prefills_on_decode: bool,
) -> None:
    """With 50 blocks of 16 tokens, sequences are preempted and wait for room."""
    config = replace(NO_PREFILL_ON_DECODE, prefill_on_decode_factor=2.0 if prefills_on_decode else None)
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
    virtual = VirtualCluster([shape(role, num_blocks) for role in roles], LAYOUT, config)
    requests.sort()
    served = virtual.serve(arrivals(requests))
    for request, (at_s, num_prompt_tokens, num_output_tokens) in zip(served, requests, strict=True):
        assert request.is_complete and len(request.token_s) == num_output_tokens
        assert request.token_s == sorted(request.token_s)
        assert request.token_s[0] >= at_s + DURATIONS.prefill_step_s
        assert request.num_prompt_tokens == num_prompt_tokens
    virtual.check_idle()
