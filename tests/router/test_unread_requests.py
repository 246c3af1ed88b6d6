"""Requests whose clients do not read their streams."""

import pytest

from pdserve.core.messages import Leg
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.events import (
    Cancel,
    StreamRead,
    StreamUnread,
)

from .cluster import Cluster, make_request, worker_info
from .overloaded import PAIRS_ONLY, finish, one_at_a_time


def decoding(*names: str) -> Cluster:
    """A cluster with requests that are being decoded; each client has two tokens."""
    cluster = Cluster("prefill-0", worker_info("decode-0", max_batch_size=len(names)), config=PAIRS_ONLY)
    for attempt, name in enumerate(names):
        cluster.submit(make_request(name, max_tokens=6))
        cluster.token("prefill-0", 0, request_id=name, attempt=attempt)
        cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=TransferId(name, attempt))
        cluster.token("decode-0", 1, request_id=name, attempt=attempt)
    return cluster


def test_an_unread_request_frees_its_room_and_resumes_at_its_clients_position() -> None:
    cluster = decoding("slow")
    cluster.handle(StreamUnread("slow"))
    assert cluster.aborts("decode-0") == [TransferId("slow", 0)]
    cluster.token("decode-0", 2, request_id="slow", attempt=0)
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=TransferId("slow", 0))
    assert cluster.tokens["slow", 0] == [0, 1]
    cluster.submit(make_request("other"))
    assert cluster.spec("decode-0").transfer.request_id == "other"
    cluster.handle(Cancel("other"))
    for worker_id, leg in (("prefill-0", Leg.PREFILL), ("decode-0", Leg.DECODE)):
        cluster.leg_ended(worker_id, leg, "aborted", transfer=TransferId("other", 1))
    cluster.handle(StreamRead("slow"))
    spec = cluster.spec("decode-0")
    assert (spec.transfer, spec.output_token_ids) == (TransferId("slow", 2), (100, 101))
    cluster.token("prefill-0", 2, request_id="slow", attempt=2)
    assert cluster.tokens["slow", 0] == [0, 1, 2]


def test_a_client_that_does_not_read_pays_for_what_is_computed_again_in_its_turn() -> None:
    cluster = one_at_a_time()
    cluster.submit(make_request("slow", num_tokens=500, client="mallory", max_tokens=100))
    assert finish(cluster) == "slow"
    cluster.token("both-0", 0)
    counters = cluster.router._queue.counters
    charged = counters.of("mallory")
    for index in range(2):
        cluster.submit(make_request(f"innocent{index}", client="alice", max_tokens=1))
    cluster.handle(StreamUnread("slow"))
    cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=TransferId("slow", 1))
    assert cluster.spec("both-0").transfer.request_id == "innocent0"
    cluster.handle(StreamRead("slow"))
    assert finish(cluster) == "innocent1"
    assert counters.of("mallory") == charged
    assert finish(cluster) == "slow"
    assert counters.of("mallory") >= charged + 500


@pytest.mark.parametrize("end", [Cancel("slow"), Cancel("slow", FinishReason.STOP, 0)])
def test_an_unread_request_can_end(end: Cancel) -> None:
    cluster = decoding("slow", "other")
    cluster.handle(StreamUnread("slow"))
    cluster.handle(end)
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=TransferId("slow", 0))
    assert len(cluster.closed["slow"]) == 1
    cluster.handle(StreamRead("slow"))
    assert cluster.spec("decode-0").transfer.request_id == "other"


def test_a_request_unread_before_its_dispatch_takes_no_place_in_the_queue() -> None:
    cluster = one_at_a_time(max_queued_requests=1)
    cluster.submit(make_request("slow"))
    cluster.handle(StreamUnread("slow"))
    cluster.submit(make_request("other", max_tokens=1))
    assert finish(cluster) == "other"
    cluster.handle(StreamRead("slow"))
    assert finish(cluster) == "slow"
