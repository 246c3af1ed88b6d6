"""Any worker may die at any moment: streams continue elsewhere from their clients' positions."""

import msgspec
import pytest

from pdserve.core.failures import FailureKind
from pdserve.core.messages import Leg, Prefill, Reserve, Role, Serve, WorkerInfo
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.events import (
    Cancel,
    Tick,
    WorkerDraining,
    WorkerIdle,
    WorkerLost,
    WorkerReady,
    WorkerRole,
    WorkersExpected,
)

from .cluster import Cluster, make_request, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None)
ERROR, LENGTH, STOP = FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP


def test_a_stream_continues_at_the_next_index_when_d_dies() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1")
    cluster.submit(make_request(max_tokens=5))
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.token("decode-0", 1)
    cluster.lose("decode-0")
    spec = cluster.spec("decode-1")
    assert spec.transfer == TransferId("r", 1)
    assert spec.output_token_ids == (100, 101)
    cluster.token("prefill-0", 2)
    cluster.token("decode-1", 3)
    cluster.token("decode-1", 4, LENGTH)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3, 4]
    counters = cluster.router.status(0.0).counters
    assert (counters.retried, counters.resumed) == (1, 1)


def test_when_p_dies_ds_leg_is_aborted_and_late_tokens_dropped() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0")
    cluster.submit(make_request())
    cluster.lose("prefill-0")
    assert cluster.aborts("decode-0") == [TransferId("r", 0)]
    assert isinstance(cluster.last("prefill-1"), Prefill)
    cluster.token("decode-0", 0, attempt=0)
    assert not cluster.tokens["r", 0]
    cluster.token("prefill-1", 0)
    assert cluster.tokens["r", 0] == [0]


def test_losing_p_after_d_has_begun_to_decode_disturbs_nothing() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0")
    cluster.submit(make_request(max_tokens=3))
    cluster.token("prefill-0", 0)
    cluster.token("decode-0", 1)
    cluster.lose("prefill-0")
    assert not cluster.aborts("decode-0")
    assert not cluster.sent["prefill-1"]
    cluster.token("decode-0", 2, LENGTH)
    assert len(cluster.ends["r"]) == 1


def test_losing_p_before_its_first_token_repeats_the_prompt() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0")
    cluster.submit(make_request(max_tokens=3))
    cluster.token("decode-0", 1)
    cluster.lose("prefill-0")
    assert cluster.spec("prefill-1").output_token_ids == ()
    cluster.token("prefill-1", 0)
    assert cluster.tokens["r", 0] == [0]


def test_a_failed_transfer_is_repeated_on_another_pair() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request())
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL, "transfer timed out")
    assert cluster.spec("prefill-1").output_token_ids == (100,)
    assert isinstance(cluster.last("decode-0"), Reserve)


def test_one_worker_serves_both_phases_when_no_pair_can_transfer() -> None:
    """A cluster of two pools that cannot reach each other, while the router reaches both."""
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request())
    cluster.token("prefill-0", 0)
    for prefill in ("prefill-0", "prefill-1"):
        transfer = cluster.spec(prefill).transfer
        assert cluster.last(prefill) == Prefill(
            spec=cluster.spec(prefill), target=worker_info("decode-0").address
        )
        cluster.leg_ended(prefill, Leg.PREFILL, "no answer within 5 s", transfer=transfer)
        cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=transfer)
        cluster.now_s += 10.0
        cluster.handle(Tick())
    assert cluster.last("decode-0") == Serve(spec=cluster.spec("decode-0"))
    assert cluster.spec("decode-0").output_token_ids[0] == 100


def at(worker_id: str, host: str) -> WorkerInfo:
    info = worker_info(worker_id)
    return msgspec.structs.replace(
        info, node=host, address=msgspec.structs.replace(info.address, host_id=host)
    )


def test_requests_and_status_react_to_a_broken_link_after_two_failures() -> None:
    cluster = Cluster(at("prefill-0", "a"), at("decode-0", "b"), at("decode-1", "c"), config=PAIRS_ONLY)
    for number in range(2):
        cluster.lose("decode-1")
        cluster.submit(make_request(f"r{number}"))
        cluster.add(msgspec.structs.replace(at("decode-1", "c"), incarnation=2 + number))
        assert isinstance(cluster.last("decode-0"), Reserve)
        cluster.leg_ended("prefill-0", Leg.PREFILL, "no answer within 5.0 s")
        cluster.leg_ended("decode-0", Leg.DECODE, "aborted")
        assert isinstance(cluster.last("decode-1"), Reserve), "it goes on elsewhere"
        cluster.token("prefill-0", 0)
        cluster.leg_ended("prefill-0", Leg.PREFILL)
        cluster.token("decode-1", 1, FinishReason.LENGTH)
        cluster.leg_ended("decode-1", Leg.DECODE)
    assert "KV does not get from host a to host b" in (cluster.router.status(cluster.now_s).degraded or "")
    num_retried = cluster.router.counters.retried
    before = len(cluster.sent["decode-0"])
    for number in range(2, 6):
        cluster.submit(make_request(f"r{number}"))
    assert len(cluster.sent["decode-0"]) == before
    assert cluster.router.counters.retried == num_retried


def test_only_choices_without_a_token_are_repeated_together() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request(n=3, max_tokens=5))
    cluster.add(worker_info("decode-1"))
    cluster.lose("decode-0")
    assert cluster.spec("decode-1").choices == (0, 1, 2)
    for choice in range(3):
        cluster.token("prefill-0", 0, choice=choice)
    cluster.token("decode-1", 1, STOP, choice=2)
    cluster.token("decode-1", 1, choice=1)
    cluster.add(worker_info("decode-2"))
    cluster.lose("decode-1")
    specs = [c.spec for c in cluster.sent["decode-2"] if isinstance(c, Reserve)]
    assert [(s.transfer.attempt, s.choices, s.output_token_ids) for s in specs] == [
        (2, (0,), (100,)),
        (3, (1,), (100, 101)),
    ]


def test_a_resumed_choice_with_one_token_left_needs_no_decode_worker() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request(max_tokens=2))
    cluster.token("prefill-0", 0)
    cluster.lose("decode-0")
    assert cluster.last("prefill-0") == Prefill(spec=cluster.spec("prefill-0"), target=None)


def test_after_max_attempts_the_request_ends_with_the_last_error() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_attempts=3))
    cluster.submit(make_request())
    for _ in range(3):
        cluster.leg_ended("both-0", Leg.DECODE, "out of luck")
        cluster.now_s += 10.0
        cluster.handle(Tick())
    (end,) = cluster.ends["r"]
    assert end.finish_reason is ERROR
    assert end.error == "gave up after 3 attempts, the last failed: both-0: out of luck"
    assert cluster.choice_ends["r", 0] == [ERROR]
    assert cluster.num_legs() == {"both-0": 0}
    assert len(cluster.closed["r"]) == 1


@pytest.mark.parametrize("is_at_prefill", [True, False])
def test_an_invalid_request_is_not_retried(is_at_prefill: bool) -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", "decode-1", config=PAIRS_ONLY)
    cluster.submit(make_request(n=2))
    if is_at_prefill:
        cluster.leg_ended("prefill-0", Leg.PREFILL, "no text fits it", kind=FailureKind.INVALID)
        assert cluster.aborts("decode-0") == [TransferId("r", 0)]
        cluster.leg_ended("decode-0", Leg.DECODE, "aborted")
    else:
        for choice in range(2):
            cluster.token("prefill-0", 0, choice=choice)
        cluster.leg_ended("prefill-0", Leg.PREFILL)
        cluster.leg_ended("decode-0", Leg.DECODE, "no text fits it", kind=FailureKind.INVALID)
    (end,) = cluster.ends["r"]
    worker = "prefill-0" if is_at_prefill else "decode-0"
    assert (end.finish_reason, end.error) == (FinishReason.INVALID, f"{worker}: no text fits it")
    assert cluster.choice_ends["r", 0] == cluster.choice_ends["r", 1] == [FinishReason.INVALID]
    assert not any(cluster.num_legs().values())
    assert len(cluster.closed["r"]) == 1


def test_giving_up_on_one_choice_withdraws_its_siblings_retry() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_attempts=3))
    cluster.submit(make_request(n=2, max_tokens=9))
    for choice in (0, 1):
        cluster.token("both-0", 0, choice=choice)
    cluster.lose("both-0")
    cluster.add(worker_info("both-0", incarnation=2))
    cluster.leg_ended("both-0", Leg.DECODE, "broken", transfer=TransferId("r", 1))
    cluster.now_s = 1.0
    cluster.handle(Tick())
    assert cluster.spec("both-0").transfer.attempt == 3
    cluster.lose("both-0")
    assert [end.finish_reason for end in cluster.ends["r"]] == [ERROR]
    assert len(cluster.closed["r"]) == 1
    assert cluster.router.status(1.0).num_queued == 0


def test_the_last_failed_legs_close_the_request_once() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_attempts=1))
    cluster.submit(make_request())
    cluster.leg_ended("both-0", Leg.DECODE)
    assert [end.finish_reason for end in cluster.ends["r"]] == [ERROR]
    assert len(cluster.closed["r"]) == 1


def test_the_first_retry_is_immediate_and_later_ones_back_off() -> None:
    cluster = Cluster("both-0", config=RouterConfig(retry_delay_s=0.02))
    cluster.submit(make_request())
    delays = []
    for attempt in range(4):
        cluster.leg_ended("both-0", Leg.DECODE, "out of luck", transfer=TransferId("r", attempt))
        due_s = cluster.router.next_tick_s() or cluster.now_s
        delays.append(round(due_s - cluster.now_s, 3))
        cluster.now_s = due_s
        cluster.handle(Tick())
    assert delays == [0.0, 0.02, 0.08, 0.32]


def test_retries_precede_the_queue_in_order_and_ignore_its_bound() -> None:
    small = worker_info("both-0", max_batch_size=2)
    cluster = Cluster(small, config=RouterConfig(max_queued_requests=1))
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name))
    cluster.lose("both-0")
    assert cluster.router.status(0.0).num_queued == 3
    cluster.add(worker_info("both-0", incarnation=2, max_batch_size=2))
    served = [c.spec.transfer.request_id for c in cluster.sent["both-0"] if isinstance(c, Serve)]
    assert served == ["a", "b", "a", "b"]


def test_legs_that_end_without_the_last_tokens_are_a_failure() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request())
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.leg_ended("decode-0", Leg.DECODE)
    assert cluster.spec("decode-0").transfer == TransferId("r", 1)


def test_held_tokens_are_delivered_once_ps_first_token_arrives() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request(max_tokens=2))
    cluster.token("decode-0", 1, LENGTH)
    cluster.leg_ended("decode-0", Leg.DECODE)
    cluster.token("prefill-0", 0)
    assert cluster.tokens["r", 0] == [0, 1]
    assert len(cluster.ends["r"]) == 1


def test_reports_of_an_old_incarnation_are_dropped() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request())
    cluster.lose("prefill-0")
    cluster.add(worker_info("prefill-0", incarnation=2))
    assert cluster.report("prefill-0", incarnation=1) == []
    assert cluster.handle(WorkerReady(worker_info("prefill-0", incarnation=1))) == []
    assert cluster.router.status(0.0).counters.stale == 2
    assert cluster.handle(WorkerLost("prefill-0", 1)) == []
    assert [w.incarnation for w in cluster.router.status(0.0).workers] == [1, 2]


def test_a_new_incarnation_implies_the_loss_of_the_previous_one() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request())
    cluster.add(worker_info("prefill-0", incarnation=2))
    assert cluster.aborts("decode-0") == [TransferId("r", 0)]
    assert cluster.spec("prefill-0").transfer.attempt == 1


def test_decode_workers_serve_alone_without_prefill_workers_and_status_reports_it() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request("a"))
    assert cluster.router.status(0.0).degraded is None
    cluster.lose("prefill-0")
    assert isinstance(cluster.last("decode-0"), Serve)
    assert (
        cluster.router.status(0.0).degraded == "no prefill worker is ready: decode workers serve both phases"
    )
    assert not cluster.sent["prefill-0"][1:]


def test_prefill_workers_serve_alone_when_no_decode_worker_is_left() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.lose("decode-0")
    cluster.submit(make_request())
    assert isinstance(cluster.last("prefill-0"), Serve)
    assert (
        cluster.router.status(0.0).degraded == "no decode worker is ready: prefill workers serve both phases"
    )


def test_requests_wait_for_the_replacement_of_the_only_worker() -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request())
    cluster.lose("both-0")
    assert not cluster.ends["r"]
    cluster.add(worker_info("both-0", incarnation=2))
    assert cluster.spec("both-0").transfer.attempt == 1


def test_requests_end_with_an_error_when_no_worker_is_expected_any_more() -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request())
    cluster.lose("both-0")
    cluster.handle(WorkersExpected(0))
    (end,) = cluster.ends["r"]
    assert (end.finish_reason, end.error) == (ERROR, "no worker is left that can serve the request")


def test_a_draining_worker_finishes_its_streams_and_becomes_idle() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1")
    cluster.submit(make_request("a", max_tokens=2))
    assert cluster.handle(WorkerDraining("decode-0")) == []
    cluster.submit(make_request("b"))
    assert cluster.spec("decode-1").transfer.request_id == "b"
    cluster.token("prefill-0", 0, request_id="a")
    cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=TransferId("a", 0))
    cluster.token("decode-0", 1, LENGTH)
    assert WorkerIdle("decode-0", 1) in cluster.leg_ended("decode-0", Leg.DECODE)


def test_draining_a_worker_without_work_reports_it_idle_at_once() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    assert cluster.handle(WorkerDraining("decode-0")) == [WorkerIdle("decode-0", 1)]
    assert cluster.handle(WorkerDraining("decode-0")) == []


def test_a_worker_takes_another_role_while_its_streams_go_on() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1")
    cluster.submit(make_request("a", max_tokens=3))
    cluster.token("prefill-0", 0)
    cluster.handle(WorkerDraining("decode-0"))
    cluster.handle(WorkerRole("decode-0", Role.PREFILL))
    cluster.token("decode-0", 1)
    assert cluster.tokens["a", 0] == [0, 1]
    cluster.lose("prefill-0")
    cluster.submit(make_request("b"))
    assert isinstance(cluster.last("decode-0"), Prefill)


def test_a_reused_id_keeps_its_attempts_apart_from_open_legs() -> None:
    cluster = Cluster(
        "prefill-0",
        "decode-0",
        config=RouterConfig(max_prefill_backlog_tokens=1, prefill_on_decode_factor=None),
    )
    cluster.submit(make_request())
    cluster.handle(Cancel("r"))  # its legs stay open until the workers report
    cluster.submit(make_request())
    cluster.handle(Cancel("r"))  # ends while waiting behind them
    cluster.submit(make_request())
    cluster.leg_ended("prefill-0", Leg.PREFILL, "aborted", transfer=TransferId("r", 0))
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=TransferId("r", 0))
    assert cluster.spec("prefill-0").transfer == TransferId("r", 1)
    cluster.router.check_integrity()
