"""GPU times, by the GPU's own events; medians."""

import statistics
from collections.abc import Callable, Sequence

import torch

_WARM_UP = 3


def median_s(call: Callable[[], object], *, inner: int = 1, repeats: int = 15) -> float:
    """The median time of one call, over `inner` calls in a row: for calls that take the GPU longer than the
    host, whose part is then hidden."""
    for _ in range(_WARM_UP):
        call()

    def batch() -> None:
        for _ in range(inner):
            call()

    return _median_s(batch, repeats) / inner


def median_in_graph_s(calls: Sequence[Callable[[], object]], *, repeats: int = 15) -> float:
    """The median time of one of `calls`, which are captured together and replayed, without any host time.
    Calls on different memory evict each other's data from the cache."""
    for call in calls:  # compiles, and copies what comes from the host
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(_WARM_UP):
        graph.replay()
    return _median_s(graph.replay, repeats) / len(calls)


def _median_s(call: Callable[[], object], repeats: int) -> float:
    events = [
        [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times_ms: list[float] = [start.elapsed_time(end) for start, end in events]
    return statistics.median(times_ms) / 1e3
