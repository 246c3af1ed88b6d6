"""Room that is made for a client where another has all places."""

import pytest

from pdserve.core.messages import Leg, Reserve, StepReport, WorkerLoad
from pdserve.core.request import FinishReason, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.waiting import REVIEW_S

from .cluster import Cluster, worker_info
from .overloaded import request_of


def with_all_places_taken(
    num_requests: int, n: int = 1, max_batch_size: int = 8, num_blocks: int = 256
) -> Cluster:
    """A cluster in which one client decodes everywhere, and has as much waiting."""
    worker = worker_info("decode-0", max_batch_size=max_batch_size, num_blocks=num_blocks)
    cluster = Cluster("prefill-0", worker, config=RouterConfig(prefill_on_decode_factor=None))
    for number in range(2 * num_requests):
        cluster.submit(request_of("greedy", f"g{number}", n=n, max_tokens=50, first_token=1000 * number))
        if number < num_requests:
            start(cluster, f"g{number}", number, n)
    assert cluster.router.status(cluster.now_s).num_queued == num_requests
    return cluster


def start(cluster: Cluster, name: str, attempt: int, n: int = 1) -> None:
    for choice in range(n):
        cluster.token("prefill-0", 0, choice=choice, request_id=name, attempt=attempt)
    cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=TransferId(name, attempt))
    for choice in range(n):
        cluster.token("decode-0", 1, choice=choice, request_id=name, attempt=attempt)


def make_room(cluster: Cluster) -> TransferId:
    """The worker ends the leg that it was last asked to abort."""
    transfer = cluster.aborts("decode-0")[-1]
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=transfer)
    return transfer


def reserved(cluster: Cluster, name: str) -> list[SequenceSpec]:
    """Returns the spec of a request that the decode worker was given."""
    commands = [command for command in cluster.sent["decode-0"] if isinstance(command, Reserve)]
    return [command.spec for command in commands if command.spec.transfer.request_id == name]


@pytest.mark.parametrize(("num_requests", "n"), [(8, 1), (2, 4)])
def test_an_idle_client_gets_a_place_from_one_that_has_all(num_requests: int, n: int) -> None:
    cluster = with_all_places_taken(num_requests, n)
    cluster.submit(request_of("new", "new"))
    assert cluster.aborts("decode-0") == [TransferId(f"g{num_requests - 1}", num_requests - 1)]
    make_room(cluster)
    assert reserved(cluster, "new")
    assert cluster.router.counters.displaced == 1


def test_room_is_also_made_where_prefill_workers_serve_both_phases() -> None:
    """The case while the decode workers restart."""
    cluster = Cluster(worker_info("prefill-0", max_batch_size=8))
    for number in range(9):
        cluster.submit(request_of("greedy", f"g{number}", max_tokens=50, first_token=1000 * number))
        if number < 8:
            cluster.token("prefill-0", 0, request_id=f"g{number}", attempt=number)
    cluster.submit(request_of("new", "new"))
    (transfer,) = cluster.aborts("prefill-0")
    cluster.leg_ended("prefill-0", Leg.DECODE, "aborted", transfer=transfer)
    assert cluster.spec("prefill-0").transfer.request_id == "new"


def test_a_displaced_stream_resumes_before_its_clients_queued_requests() -> None:
    cluster = with_all_places_taken(8)
    cluster.submit(request_of("new", "new"))
    make_room(cluster)
    start(cluster, "new", 8)
    cluster.token("decode-0", 2, FinishReason.STOP, request_id="new", attempt=8)
    cluster.leg_ended("decode-0", Leg.DECODE, transfer=TransferId("new", 8))
    spec = cluster.spec("decode-0")
    assert (spec.transfer.request_id, spec.output_token_ids) == ("g7", (100, 101))
    cluster.token("prefill-0", 2, request_id="g7", attempt=9)
    assert cluster.tokens["g7", 0] == [0, 1, 2]


def test_room_is_made_once_per_job_and_not_retaken_by_the_giver() -> None:
    cluster = with_all_places_taken(8)
    cluster.submit(request_of("new", "new"))
    for _ in range(3):
        cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad()))
    assert len(cluster.aborts("decode-0")) == 1
    make_room(cluster)
    assert cluster.spec("decode-0").transfer.request_id == "new"
    cluster.submit(request_of("new", "second"))
    assert len(cluster.aborts("decode-0")) == 1


def test_room_for_several_choices_is_made_one_place_after_the_other() -> None:
    cluster = with_all_places_taken(8)
    cluster.submit(request_of("new", "new", n=3))
    for _ in range(3):
        make_room(cluster)
    assert cluster.spec("decode-0").choices == (0, 1, 2)
    assert cluster.router.counters.displaced == 3


def test_no_client_gives_up_its_last_place_or_falls_below_the_taker() -> None:
    alone = with_all_places_taken(1, max_batch_size=1)
    alone.submit(request_of("new", "new"))
    two = with_all_places_taken(2, max_batch_size=2)
    two.submit(request_of("new", "new", n=2))
    assert not alone.aborts("decode-0") and not two.aborts("decode-0")
    assert not reserved(alone, "new") and not reserved(two, "new")


def test_choices_of_a_clients_only_request_make_room_where_they_run() -> None:
    cluster = with_all_places_taken(1, n=8)
    cluster.submit(request_of("new", "new"))
    assert reserved(cluster, "new") and not cluster.aborts("decode-0")


def test_those_on_their_way_to_a_full_worker_take_no_more_than_they_leave() -> None:
    cluster = with_all_places_taken(1, n=8)  # 2 blocks of prompt, and one for each choice
    for name in ("a", "b"):
        cluster.submit(request_of(name, name))
    assert reserved(cluster, "a") and not reserved(cluster, "b")
    start(cluster, "a", 1)
    cluster.tick(REVIEW_S)
    assert reserved(cluster, "b")


def test_a_request_too_large_for_half_of_what_a_client_has_waits_for_room() -> None:
    cluster = with_all_places_taken(1, n=8)
    cluster.submit(request_of("new", "new", 100))
    assert not reserved(cluster, "new")


def test_clients_with_equal_shares_take_nothing_from_each_other() -> None:
    cluster = with_all_places_taken(8)
    for name in ("a", "b"):
        cluster.submit(request_of(name, name, n=3))
        for _ in range(3):
            if cluster.aborts("decode-0"):
                make_room(cluster)
    num_displaced = cluster.router.counters.displaced
    for name in ("a", "b", "greedy"):
        cluster.submit(request_of(name, f"{name}-again"))
    assert cluster.router.counters.displaced == num_displaced


def test_blocks_that_a_clients_streams_have_grown_into_count_as_places() -> None:
    cluster = with_all_places_taken(2, num_blocks=8)
    for index in range(2, 36):
        for number in range(2):
            cluster.token("decode-0", index, request_id=f"g{number}", attempt=number)
    cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad(num_free_blocks=0)))
    cluster.submit(request_of("new", "new"))
    assert len(cluster.aborts("decode-0")) == 1


def test_a_client_alone_has_all_places_and_keeps_them() -> None:
    cluster = with_all_places_taken(8)
    assert cluster.router.counters.displaced == 0
