"""Workers that die or freeze: streams continue elsewhere with identical tokens, and a new incarnation takes
over."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from pdserve.proto import pdserve_pb2 as pb

from .harness import READY, Cluster, Clusters, session_processes, tokens_of

pytestmark = pytest.mark.cluster
PROMPTS = [
    "The with statement is used to wrap the execution of a block",
    "A generator is a function which returns an iterator",
    "Return a new sorted list from the items in iterable",
    "The import statement combines two operations",
]
LONG_PROMPTS = [[(7 * i + 13 * number) % 1000 + 10 for i in range(1200)] for number in range(8)]
MAX_TRIES = 5
Events = list[pb.GenerateEvent]


@pytest.fixture
def cluster(clusters: Clusters) -> Iterator[Cluster]:
    """Every test must leave all workers ready, all blocks free and no extra process."""
    cluster = clusters.get(prefill=2, decode=2)
    yield cluster
    cluster.wait_for(prefill=2, decode=2)
    cluster.check_all_blocks_free()
    assert sum("WorkerActor" in command for command in session_processes().values()) == 4


def worker(cluster: Cluster, worker_id: str) -> pb.WorkerStatus:
    (found,) = (worker for worker in cluster.status().workers if worker.worker_id == worker_id)
    return found


def wait_until_lost(cluster: Cluster, workers: Sequence[pb.WorkerStatus]) -> None:
    """Waits until the cluster relies on none of these processes any more."""
    pids = {worker.pid for worker in workers}
    for status in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
        if not any(worker.pid in pids and worker.state == READY for worker in status.workers):
            return
    raise AssertionError("the status stream ended")


def begin(cluster: Cluster, requests: Sequence[pb.GenerateRequest]) -> tuple[list[Any], list[Events]]:
    """Returns the calls, each of which has received its first tokens."""
    calls = [cluster.generation.GenerateStream(request, timeout=120) for request in requests]
    return calls, [[next(iter(call))] for call in calls]


def finish(calls: Sequence[Any], begun: Sequence[Events]) -> list[Events]:
    with ThreadPoolExecutor(max_workers=len(calls)) as pool:
        return [
            first + rest for first, rest in zip(begun, pool.map(list[pb.GenerateEvent], calls), strict=True)
        ]


def decoding_requests(cluster: Cluster) -> list[pb.GenerateRequest]:
    """Short prompts, long outputs; greedy, and seeded with two choices."""
    requests = [cluster.request(prompt, max_tokens=500) for prompt in PROMPTS]
    return [*requests, cluster.request(PROMPTS[0], max_tokens=250, n=2, temperature=0.9, seed=5)]


def assert_equal_streams(streams: Sequence[Events], undisturbed: Sequence[Events]) -> None:
    for events, expected in zip(streams, undisturbed, strict=True):
        for choice in {event.tokens.choice for event in expected if event.HasField("tokens")}:
            assert tokens_of(events, choice) == tokens_of(expected, choice)


def assert_replaced(cluster: Cluster, before: pb.WorkerStatus) -> None:
    cluster.wait_for(prefill=2, decode=2)
    after = worker(cluster, before.worker_id)
    assert after.pid != before.pid
    assert after.num_restarts == before.num_restarts + 1


def later_attempts(streams: Sequence[Events]) -> list[pb.Attempt]:
    return [attempt for events in streams for attempt in events[-1].end.timeline.attempts[1:]]


def in_time(disturb: Callable[[], list[Events]]) -> list[pb.Attempt]:
    """Repeats a disturbance that came when all streams had ended already, as it may where this process had to
    wait for a core; returns the attempts that resumed a stream."""
    for _ in range(MAX_TRIES):
        if resumed := later_attempts(disturb()):
            return resumed
    raise AssertionError(f"no stream was running at any of {MAX_TRIES} disturbances")


def test_streams_survive_the_death_of_their_decode_worker_token_for_token(cluster: Cluster) -> None:
    requests = decoding_requests(cluster)
    undisturbed = cluster.generate_all(requests)

    def kill() -> list[Events]:
        calls, begun = begin(cluster, requests)
        victim = max(cluster.workers("decode"), key=lambda worker: worker.num_running)
        os.kill(victim.pid, signal.SIGKILL)
        streams = finish(calls, begun)
        assert_equal_streams(streams, undisturbed)
        assert_replaced(cluster, victim)
        return streams

    assert in_time(kill)


def test_prompts_survive_the_death_of_their_prefill_worker(cluster: Cluster) -> None:
    undisturbed = cluster.generate_all(cluster.request(prompt, salt="undisturbed") for prompt in LONG_PROMPTS)
    salts = (f"disturbed {number}" for number in count())  # so that no prompt is cached

    def kill() -> list[Events]:
        victim, salt = cluster.workers("prefill")[0], next(salts)
        with ThreadPoolExecutor(max_workers=len(LONG_PROMPTS)) as pool:
            running = [
                pool.submit(cluster.stream, cluster.request(prompt, salt=salt)) for prompt in LONG_PROMPTS
            ]
            while not worker(cluster, victim.worker_id).num_running:
                if all(future.done() for future in running):
                    break
            os.kill(victim.pid, signal.SIGKILL)
            streams = [future.result() for future in running]
        assert_equal_streams(streams, undisturbed)
        assert_replaced(cluster, victim)
        return streams

    assert in_time(kill)


def test_frozen_workers_are_given_up_and_their_late_reports_ignored(cluster: Cluster) -> None:
    """Hits one worker of each pool, with streams that decode there and prompts sent there before the failure
    is detected."""
    decoding = decoding_requests(cluster)
    undisturbed = cluster.generate_all(
        [*decoding, *(cluster.request(prompt, salt="awake") for prompt in LONG_PROMPTS)]
    )

    def freeze() -> list[Events]:
        frozen = [cluster.workers(role)[1] for role in ("prefill", "decode")]
        processes = [os.pidfd_open(victim.pid) for victim in frozen]
        calls, begun = begin(cluster, decoding)
        for process in processes:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
        for prompt in LONG_PROMPTS:
            request = cluster.request(prompt, salt="frozen")
            calls.append(cluster.generation.GenerateStream(request, timeout=120))
            begun.append([])
        wait_until_lost(cluster, frozen)
        for process in processes:
            with suppress(ProcessLookupError):  # killed already
                signal.pidfd_send_signal(process, signal.SIGCONT)
            os.close(process)
        streams = finish(calls, begun)
        assert_equal_streams(streams, undisturbed)
        for victim in frozen:
            assert_replaced(cluster, victim)
        return streams

    assert in_time(freeze)


def test_prefill_workers_stand_in_while_no_decode_worker_is_left(cluster: Cluster) -> None:
    requests = decoding_requests(cluster)
    undisturbed = cluster.generate_all(requests)

    def kill() -> list[Events]:
        victims = cluster.workers("decode")
        calls, begun = begin(cluster, requests)
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        wait_until_lost(cluster, victims)
        assert "prefill workers serve both phases" in cluster.status().degraded
        streams = finish(calls, begun)
        assert_equal_streams(streams, undisturbed)
        for victim in victims:
            assert_replaced(cluster, victim)
        return streams

    stand_ins = {worker.worker_id for worker in cluster.workers("prefill")}
    assert {attempt.decode.worker for attempt in in_time(kill)} & stand_ins
