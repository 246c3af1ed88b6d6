"""Workers that die or freeze: streams go on elsewhere with the very same tokens, and a new incarnation takes over."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdserve.proto import pdserve_pb2 as pb

from .harness import Cluster, tokens_of

pytestmark = pytest.mark.cluster
PROMPTS = [
    "The with statement is used to wrap the execution of a block",
    "A generator is a function which returns an iterator",
    "Return a new sorted list from the items in iterable",
    "The import statement combines two operations",
]


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    cluster = Cluster("embedded", prefill=2, decode=2)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The module's cluster; every test must leave all workers ready and all blocks free."""
    yield shared
    shared.wait_for(prefill=2, decode=2)
    shared.check_all_blocks_free()


def worker(cluster: Cluster, worker_id: str) -> pb.WorkerStatus:
    (found,) = [w for w in cluster.admin.GetStatus(pb.GetStatusRequest()).workers if w.worker_id == worker_id]
    return found


def hit_while_streaming(cluster: Cluster, requests: list[pb.GenerateRequest], worker_id: str, signal_number: int) -> list:  # type: ignore[type-arg]
    """All streams' events; the worker gets the signal when each stream has begun."""
    calls = [cluster.generation.GenerateStream(request, timeout=120) for request in requests]
    begun = [[next(call)] for call in calls]
    os.kill(worker(cluster, worker_id).pid, signal_number)
    with ThreadPoolExecutor(max_workers=len(calls)) as pool:
        return [first + rest for first, rest in zip(begun, pool.map(list, calls), strict=True)]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_survive_the_loss_of_their_decode_worker_token_for_token(cluster: Cluster, signal_number: int) -> None:
    requests = [cluster.request(prompt, max_tokens=800) for prompt in PROMPTS]
    requests.append(cluster.request(PROMPTS[0], max_tokens=400, n=2, temperature=0.9, seed=5))
    expected = cluster.generate_all(requests)
    before = worker(cluster, "decode-0")
    streams = hit_while_streaming(cluster, requests, "decode-0", signal_number)
    for events, undisturbed in zip(streams, expected, strict=True):
        for choice in {event.tokens.choice for event in undisturbed if event.HasField("tokens")}:
            assert tokens_of(events, choice) == tokens_of(undisturbed, choice)
    assert any(len(events[-1].end.timeline.attempts) > 1 for events in streams)
    cluster.wait_for(prefill=2, decode=2)
    after = worker(cluster, "decode-0")
    assert after.pid != before.pid
    assert after.num_restarts == before.num_restarts + 1


def test_prompts_survive_the_death_of_their_prefill_worker(cluster: Cluster) -> None:
    prompts = [[(7 * i + 13 * number) % 1000 + 10 for i in range(1800)] for number in range(8)]
    expected = cluster.generate_all(cluster.request(prompt, salt="undisturbed") for prompt in prompts)
    before = worker(cluster, "prefill-0")
    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        running = [pool.submit(cluster.stream, cluster.request(prompt, salt="disturbed")) for prompt in prompts]
        while not worker(cluster, "prefill-0").num_running:
            assert not all(future.done() for future in running)
        os.kill(before.pid, signal.SIGKILL)
        streams = [future.result() for future in running]
    assert [tokens_of(events) for events in streams] == [tokens_of(events) for events in expected]
    cluster.wait_for(prefill=2, decode=2)
    assert worker(cluster, "prefill-0").pid != before.pid
