"""Clients see contiguous tokens, one ending per choice and one per request; workers get the matching
commands."""

import pytest

from pdserve.core.messages import Leg, Prefill, Reserve, Serve, TokenOutput
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.events import Cancel, EmitTokens, Tick

from .cluster import Cluster, make_request

CANCELLED, STOP, LENGTH, DEADLINE = (
    FinishReason.CANCELLED,
    FinishReason.STOP,
    FinishReason.LENGTH,
    FinishReason.DEADLINE,
)


def pair() -> Cluster:
    return Cluster("prefill-0", "decode-0")


def test_a_request_starts_on_d_and_p_at_once_under_one_transfer() -> None:
    cluster = pair()
    cluster.submit(make_request())
    reserve, prefill = cluster.last("decode-0"), cluster.last("prefill-0")
    assert isinstance(reserve, Reserve)
    assert isinstance(prefill, Prefill)
    assert reserve.spec.transfer == prefill.spec.transfer == TransferId("r", 0)
    assert (reserve.source_worker_id, reserve.source_incarnation) == ("prefill-0", 1)
    assert prefill.target is not None
    assert prefill.target.worker_id == "decode-0"


def test_the_first_token_comes_from_p_and_the_others_from_d() -> None:
    cluster = pair()
    cluster.submit(make_request(max_tokens=3))
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.token("decode-0", 1)
    cluster.token("decode-0", 2, LENGTH)
    assert cluster.tokens["r", 0] == [0, 1, 2]
    assert cluster.choice_ends["r", 0] == [LENGTH]
    assert [end.finish_reason for end in cluster.ends["r"]] == [None]
    assert not cluster.closed["r"]
    cluster.leg_ended("decode-0", Leg.DECODE)
    assert len(cluster.closed["r"]) == 1
    assert not cluster.aborts("decode-0")
    assert not cluster.aborts("prefill-0")


def test_early_tokens_are_held_and_repeated_ones_dropped() -> None:
    cluster = pair()
    cluster.submit(make_request(max_tokens=4))
    assert not any(isinstance(c, EmitTokens) for c in cluster.token("decode-0", 1))
    cluster.token("decode-0", 2)
    cluster.token("prefill-0", 0)
    assert cluster.tokens["r", 0] == [0, 1, 2]
    cluster.token("decode-0", 1)
    cluster.token("prefill-0", 0)
    cluster.token("decode-0", 3, STOP)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3]


def test_a_single_token_costs_no_reservation_and_no_transfer() -> None:
    cluster = pair()
    cluster.submit(make_request(max_tokens=1))
    assert cluster.last("prefill-0") == Prefill(spec=cluster.spec("prefill-0"), target=None)
    assert not cluster.sent["decode-0"]
    cluster.token("prefill-0", 0, LENGTH)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    assert len(cluster.closed["r"]) == 1


def test_ending_at_the_first_token_aborts_the_transfer_on_both_sides() -> None:
    cluster = pair()
    cluster.submit(make_request())
    cluster.token("prefill-0", 0, STOP)
    assert cluster.aborts("decode-0") == [TransferId("r", 0)]
    assert cluster.aborts("prefill-0") == [TransferId("r", 0)]
    assert len(cluster.ends["r"]) == 1


def test_several_choices_are_one_dispatch_and_end_one_by_one() -> None:
    cluster = pair()
    cluster.submit(make_request(n=2, max_tokens=2))
    assert cluster.spec("prefill-0").choices == (0, 1)
    for choice in (0, 1):
        cluster.token("prefill-0", 0, choice=choice)
    cluster.token("decode-0", 1, LENGTH, choice=1)
    assert cluster.choice_ends["r", 1] == [LENGTH]
    assert not cluster.ends["r"]
    cluster.token("decode-0", 1, LENGTH, choice=0)
    assert len(cluster.ends["r"]) == 1
    assert not cluster.aborts("decode-0")


def test_cancel_ends_at_once_and_accounts_for_legs_until_they_end() -> None:
    cluster = pair()
    cluster.submit(make_request())
    cluster.handle(Cancel("r"))
    assert cluster.choice_ends["r", 0] == [CANCELLED]
    assert [end.finish_reason for end in cluster.ends["r"]] == [CANCELLED]
    assert cluster.aborts("decode-0") == cluster.aborts("prefill-0") == [TransferId("r", 0)]
    assert cluster.num_legs() == {"prefill-0": 1, "decode-0": 1}
    cluster.leg_ended("prefill-0", Leg.PREFILL, "aborted")
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted")
    assert cluster.num_legs() == {"prefill-0": 0, "decode-0": 0}
    assert len(cluster.closed["r"]) == 1
    assert cluster.router.status(0.0).counters.retried == 0


def test_a_cancelled_choice_is_aborted_where_it_decodes() -> None:
    cluster = pair()
    cluster.submit(make_request(n=2, max_tokens=9))
    for choice in (0, 1):
        cluster.token("prefill-0", 0, choice=choice)
    assert cluster.router._registry.get("decode-0").num_sequences == 2  # type: ignore[union-attr]
    cluster.handle(Cancel("r", STOP, choice=0))
    assert cluster.aborts("decode-0", choice=0) == [TransferId("r", 0)]
    assert not cluster.aborts("prefill-0", choice=0), "its prompt is the others' too"
    assert cluster.router._registry.get("decode-0").num_sequences == 1  # type: ignore[union-attr]
    cluster.token("decode-0", 1, choice=0)
    cluster.token("decode-0", 1, choice=1)
    assert cluster.choice_ends["r", 0] == [STOP]
    assert cluster.tokens["r", 0] == [0]
    assert cluster.tokens["r", 1] == [0, 1]
    assert not cluster.aborts("decode-0")
    cluster.handle(Cancel("r", STOP, choice=1))
    assert cluster.aborts("decode-0") == [TransferId("r", 0)]
    assert [end.finish_reason for end in cluster.ends["r"]] == [None]


def test_d_is_aborted_when_the_last_uncancelled_choice_ends() -> None:
    cluster = pair()
    cluster.submit(make_request(n=2, max_tokens=2))
    for choice in (0, 1):
        cluster.token("prefill-0", 0, choice=choice)
    cluster.handle(Cancel("r", STOP, choice=0))
    cluster.token("decode-0", 1, LENGTH, choice=1)
    assert cluster.aborts("decode-0") == [TransferId("r", 0)]


@pytest.mark.parametrize("event", [Cancel("unknown"), Cancel("r", choice=7), Cancel("r", choice=-1)])
def test_cancelling_an_unknown_request_or_choice_changes_nothing(event: Cancel) -> None:
    cluster = pair()
    cluster.submit(make_request())
    assert cluster.handle(event) == []


def test_a_passed_deadline_ends_a_running_request_and_frees_both_workers() -> None:
    cluster = pair()
    cluster.submit(make_request(deadline_s=5.0))
    assert cluster.router.next_tick_s() == 5.0
    cluster.now_s = 5.0
    cluster.handle(Tick())
    assert cluster.choice_ends["r", 0] == [DEADLINE]
    assert cluster.aborts("decode-0") == cluster.aborts("prefill-0") == [TransferId("r", 0)]
    assert cluster.router.status(5.0).counters.expired == 1
    assert cluster.router.next_tick_s() is None


def test_late_and_duplicate_messages_of_an_ended_request_are_harmless() -> None:
    cluster = pair()
    cluster.submit(make_request(max_tokens=1))
    cluster.token("prefill-0", 0, LENGTH)
    for _ in range(2):
        cluster.leg_ended("prefill-0", Leg.PREFILL)
        cluster.token("prefill-0", 0, LENGTH)
        cluster.token("prefill-0", 1, LENGTH)
    assert cluster.tokens["r", 0] == [0]
    assert len(cluster.ends["r"]) == len(cluster.closed["r"]) == 1


def test_tokens_of_a_worker_outside_the_dispatch_are_dropped() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1")
    cluster.submit(make_request())
    assert cluster.report("decode-1", TokenOutput(TransferId("r", 0), 0, 0, 7)) == []


def test_old_legs_do_not_touch_a_new_request_with_the_same_id() -> None:
    cluster = pair()
    cluster.submit(make_request())
    cluster.handle(Cancel("r"))
    cluster.submit(make_request())
    assert cluster.spec("prefill-0").transfer == TransferId("r", 1)
    cluster.token("prefill-0", 0, attempt=0)
    assert not cluster.tokens["r", 0]
    cluster.leg_ended("prefill-0", Leg.PREFILL, "aborted", transfer=TransferId("r", 0))
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=TransferId("r", 0))
    assert len(cluster.closed["r"]) == 1
    assert cluster.num_legs() == {"prefill-0": 1, "decode-0": 1}


def test_the_timeline_has_workers_instants_and_the_workers_own_account() -> None:
    cluster = pair()
    cluster.submit(make_request(max_tokens=2))
    cluster.now_s = 1.0
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.now_s = 2.0
    cluster.token("decode-0", 1, LENGTH)
    timeline = cluster.ends["r"][0].timeline
    (dispatch,) = timeline.dispatches
    assert (timeline.submitted_s, timeline.first_token_s, timeline.ended_s) == (0.0, 1.0, 2.0)
    assert (dispatch.prefill_worker, dispatch.decode_worker, dispatch.num_tokens) == (
        "prefill-0",
        "decode-0",
        20,
    )
    assert dispatch.prefill is not None
    assert dispatch.decode is None
    cluster.leg_ended("decode-0", Leg.DECODE)
    assert cluster.closed["r"][0].timeline.dispatches[0].decode is not None


def test_one_worker_serves_both_phases_as_one_leg() -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request(max_tokens=2))
    assert isinstance(cluster.last("both-0"), Serve)
    cluster.token("both-0", 0)
    cluster.leg_ended("both-0", Leg.PREFILL)
    assert cluster.num_legs() == {"both-0": 1}
    cluster.token("both-0", 1, LENGTH)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.num_legs() == {"both-0": 0}
    assert len(cluster.closed["r"]) == 1
