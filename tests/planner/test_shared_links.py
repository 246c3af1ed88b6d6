import heapq

import pytest
from hypothesis import given, strategies as st

from pdserve.planner.shared_links import Flow, SharedLinks

NAMES = ("a", "b", "c", "d")


def play(starts: list[tuple[float, str, str, float]], bytes_per_s: float = 100.0) -> dict[int, float]:
    """(at_s, source, target, bytes) -> when each flow ended, by its place in `starts`."""
    links = SharedLinks(dict.fromkeys(NAMES, bytes_per_s))
    events: list[tuple[float, int, int, Flow | None]] = []
    flows: dict[Flow, int] = {}
    ends: dict[int, float] = {}
    for number, (at_s, *_) in enumerate(starts):
        heapq.heappush(events, (at_s, number, 0, None))
    order = len(starts)
    while events:
        now_s, number, version, flow = heapq.heappop(events)
        if flow is None:
            _, source, target, num_bytes = starts[number]
            flow = Flow(source, target, num_bytes)
            flows[flow] = number
            moved = links.start(flow, now_s)
        elif flow.version != version:
            continue
        else:
            ends[flows[flow]] = now_s
            moved = links.end(flow, now_s)
        for one in moved:
            order += 1
            heapq.heappush(events, (one.end_s, order, one.version, one))
    return ends


def test_a_flow_alone_has_the_whole_link() -> None:
    assert play([(1.0, "a", "b", 200.0)]) == {0: 3.0}


def test_flows_into_one_port_share_it() -> None:
    ends = play([(0.0, "a", "c", 100.0), (0.0, "b", "c", 100.0)])
    assert ends == {0: pytest.approx(2.0), 1: pytest.approx(2.0)}


def test_flows_out_of_one_port_share_it() -> None:
    ends = play([(0.0, "a", "b", 100.0), (0.0, "a", "c", 100.0)])
    assert ends == {0: pytest.approx(2.0), 1: pytest.approx(2.0)}


def test_a_flow_gets_the_rest_of_the_link_when_another_ends() -> None:
    ends = play([(0.0, "a", "c", 50.0), (0.0, "b", "c", 100.0)])
    assert ends == {0: pytest.approx(1.0), 1: pytest.approx(1.5)}


def test_both_directions_of_a_link_are_independent() -> None:
    assert play([(0.0, "a", "b", 100.0), (0.0, "b", "a", 100.0)]) == {0: 1.0, 1: 1.0}


def test_bytes_that_follow_later_lengthen_a_flow() -> None:
    links = SharedLinks(dict.fromkeys(NAMES, 100.0))
    flow = Flow("a", "b", 100.0)
    links.start(flow, 0.0)
    links.extend(flow, 50.0, 0.5)
    assert flow.left_bytes(0.5) == pytest.approx(100.0)
    assert flow.end_s == pytest.approx(1.5)


FLOWS = st.lists(
    st.tuples(
        st.floats(0, 10), st.sampled_from(NAMES[:2]), st.sampled_from(NAMES[2:]), st.floats(1.0, 1000.0)
    ),
    min_size=1,
    max_size=12,
)


@given(FLOWS)
def test_every_flow_ends_and_no_port_exceeds_its_bandwidth(
    starts: list[tuple[float, str, str, float]],
) -> None:
    ends = play(starts)
    assert ends.keys() == set(range(len(starts)))
    for port in NAMES:
        used = [number for number, (_, *ends_at, _) in enumerate(starts) if port in ends_at]
        for number in used:
            start_s, _, _, num_bytes = starts[number]
            assert ends[number] - start_s >= num_bytes / 100.0 - 1e-6
        if used:
            first_s, last_s = min(starts[number][0] for number in used), max(ends[number] for number in used)
            assert (last_s - first_s) * 100.0 >= sum(starts[number][3] for number in used) - 1e-3
