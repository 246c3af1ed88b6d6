"""A worker that hung up on a router that had stood still: its streams wait for it, and continue when it is
back."""

from pdserve.core.messages import HeldLeg, Leg, LegEnded, Serve, TokenOutput
from pdserve.core.request import FinishReason
from pdserve.router.events import Cancel, WorkerAway, WorkerReady

from .cluster import Cluster, make_request, worker_info


def serving(num_tokens: int, max_tokens: int = 8) -> Cluster:
    """A worker that serves request `r` by itself, and has reported some of its tokens."""
    cluster = Cluster("decode-0")
    cluster.submit(make_request(max_tokens=max_tokens))
    for index in range(num_tokens):
        cluster.token("decode-0", index)
    cluster.handle(WorkerAway("decode-0", 1))
    return cluster


def come_back(cluster: Cluster, *held: HeldLeg) -> None:
    cluster.handle(WorkerReady(worker_info("decode-0"), held))


def held(cluster: Cluster, num_tokens: int, finish: FinishReason | None = None) -> HeldLeg:
    """The leg of the last request, with tokens; the last one may be its end."""
    spec = cluster.spec("decode-0")
    outputs = tuple(
        TokenOutput(spec.transfer, 0, index, 100 + index, finish if index == num_tokens - 1 else None)
        for index in range(num_tokens)
    )
    ended = LegEnded(worker_id="decode-0", incarnation=1, transfer=spec.transfer, leg=Leg.DECODE)
    return HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False, ended=ended if finish else None)


def test_a_stream_continues_where_it_is_with_what_was_computed_meanwhile() -> None:
    cluster = serving(2)
    assert cluster.tokens["r", 0] == [0, 1] and not cluster.ends["r"]
    come_back(cluster, held(cluster, 5))
    assert cluster.tokens["r", 0] == [0, 1, 2, 3, 4]
    cluster.token("decode-0", 5)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3, 4, 5]
    assert len(cluster.sent["decode-0"]) == 1 and not cluster.router.counters.retried


def test_a_stream_that_ended_meanwhile_ends_once() -> None:
    cluster = serving(2, max_tokens=4)
    come_back(cluster, held(cluster, 4, FinishReason.LENGTH))
    assert cluster.tokens["r", 0] == [0, 1, 2, 3]
    assert cluster.choice_ends["r", 0] == [FinishReason.LENGTH]
    assert len(cluster.ends["r"]) == 1 and cluster.num_legs() == {"decode-0": 0}


def test_a_command_that_never_arrived_is_sent_again() -> None:
    cluster = serving(0)
    come_back(cluster)
    assert len([c for c in cluster.sent["decode-0"] if isinstance(c, Serve)]) == 2
    assert cluster.num_legs() == {"decode-0": 1}


def test_an_abort_that_was_lost_is_sent_again() -> None:
    cluster = serving(1)
    cluster.handle(Cancel("r"))
    leg = held(cluster, 3)
    come_back(cluster, leg)
    assert cluster.aborts("decode-0") == [leg.spec.transfer] * 2
    assert cluster.tokens["r", 0] == [0]


def test_requests_wait_for_a_worker_that_is_away_and_go_to_none() -> None:
    cluster = serving(1)
    cluster.submit(make_request("later"))
    assert len(cluster.sent["decode-0"]) == 1 and not cluster.ends["later"]
    come_back(cluster, held(cluster, 1))
    assert cluster.spec("decode-0").transfer.request_id == "later"


def test_a_worker_that_does_not_come_back_is_lost_with_its_legs() -> None:
    cluster = serving(1)
    cluster.add(worker_info("decode-1"))
    cluster.lose("decode-0")
    assert cluster.spec("decode-1").output_token_ids == (100,)
