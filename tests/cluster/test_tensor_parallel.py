"""Instances of several ranks on a real cluster: the tokens are those of `transformers` whatever P and D have,
and the end of any rank is the end of its instance, without a trace."""

import os
import re
import signal
from typing import Any

import pytest

from pdserve.proto import pdserve_pb2 as pb

from ..exactness.test_joined_engines import random_prompts, reference
from ..processes import await_end
from .conftest import Checkpoints
from .harness import Cluster, Clusters, session_processes, text_of, tokens_of
from .test_deaths import PROMPTS, begin, decoding_requests, finish, in_time

pytestmark = pytest.mark.cluster


def pools_of(num_prefill_ranks: int, num_decode_ranks: int, num_decode: int = 1) -> dict[str, Any]:
    options = {"cpus_per_instance": 0.5, "kv_cache_bytes": 64 << 20, "max_batch_size": 4}
    return {
        "prefill": {"tensor_parallel": num_prefill_ranks, **options},
        "decode": {"instances": num_decode, "tensor_parallel": num_decode_ranks, **options},
    }


def pids_of(worker: pb.WorkerStatus) -> list[int]:
    """Returns the processes of its ranks."""
    return [worker.pid, *worker.rank_pids]


@pytest.mark.parametrize(("p", "d"), [(2, 1), (1, 2)])
def test_unequal_numbers_of_ranks_serve_the_tokens_of_transformers(
    p: int, d: int, checkpoints: Checkpoints, clusters: Clusters
) -> None:
    path = checkpoints["llama-gqa"]
    prompts = random_prompts((1, 40, 300), seed=3)
    expected = reference(path, prompts)
    cluster = clusters.get(path, pools=pools_of(p, d))
    for worker in cluster.status().workers:
        assert len(pids_of(worker)) == (p if worker.role == "prefill" else d)
    for is_cached in (False, True):
        streams = cluster.generate_all(cluster.request(prompt, n=2, logprobs=0) for prompt in prompts)
        for events, (tokens, logprobs) in zip(streams, expected, strict=True):
            for choice in (0, 1):
                assert tokens_of(events, choice) == tokens
                seen = [
                    lp.logprob
                    for event in events
                    if event.HasField("tokens") and event.tokens.choice == choice
                    for lp in event.tokens.logprobs
                ]
                assert seen == pytest.approx(logprobs, abs=1e-4)
        assert (streams[-1][-1].end.usage.cached_tokens >= 256) == is_cached
    cluster.check_all_blocks_free()


@pytest.fixture
def cluster(clusters: Clusters) -> Cluster:
    return clusters.get("embedded", prefill=1, decode=2, pools=pools_of(2, 2, num_decode=2))


def test_an_instance_of_several_ranks_follows_a_grammar(cluster: Cluster) -> None:
    request = cluster.request(PROMPTS[0], max_tokens=30, ignore_eos=False)
    request.sampling.constraint.regex = "[a-f]{4}[0-9]{2}"
    assert re.fullmatch("[a-f]{4}[0-9]{2}", text_of(cluster.stream(request)))


@pytest.mark.parametrize("is_frozen", [False, True], ids=["killed", "frozen"])
def test_streams_survive_the_end_of_one_rank_and_nothing_is_left_of_the_others(
    is_frozen: bool, cluster: Cluster
) -> None:
    requests = decoding_requests(cluster)
    undisturbed = cluster.generate_all(requests)

    def strike() -> list[list[pb.GenerateEvent]]:
        calls, begun = begin(cluster, requests)
        victim = max(cluster.workers("decode"), key=lambda worker: worker.num_running)
        os.kill(victim.rank_pids[0], signal.SIGSTOP if is_frozen else signal.SIGKILL)
        streams = finish(calls, begun)
        for events, expected in zip(streams, undisturbed, strict=True):
            for choice in {event.tokens.choice for event in expected if event.HasField("tokens")}:
                assert tokens_of(events, choice) == tokens_of(expected, choice)
        for pid in pids_of(victim):
            await_end(pid)
        status = cluster.wait_for(prefill=1, decode=2)
        assert sum(worker.worker_id == victim.worker_id for worker in status.workers) == 1
        return streams

    assert in_time(strike)
    cluster.check_all_blocks_free()
    assert sum("WorkerActor" in command for command in session_processes().values()) == 6


def test_the_death_of_rank_0_ends_the_others(cluster: Cluster) -> None:
    (victim,) = cluster.workers("prefill")
    os.kill(victim.pid, signal.SIGKILL)
    for pid in pids_of(victim):
        await_end(pid)
    for status in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
        if all(worker.pid != victim.pid for worker in status.workers):
            break
    cluster.wait_for(prefill=1, decode=2)
    assert tokens_of(cluster.stream(cluster.request(PROMPTS[0])))
    assert sum("WorkerActor" in command for command in session_processes().values()) == 6
