"""A router that succeeds one that died: workers' held legs become requests again, and clients that come back
get their whole streams."""

from itertools import pairwise

import msgspec
import pytest

from pdserve.core.errors import DuplicateRequest, NoWorkerAvailable
from pdserve.core.messages import (
    HeldLeg,
    Leg,
    LegEnded,
    Prefill,
    Reserve,
    Serve,
    StepReport,
    TokenOutput,
    WorkerLoad,
)
from pdserve.core.request import FinishReason, Request, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import Adopted, EmitTokens, Submit, Tick, WorkerLost, WorkerReady
from pdserve.router.prefix_index import block_keys

from .cluster import Cluster, make_request, worker_info

FIRST_ATTEMPT = 1000


def spec_of(request: Request, attempt: int = 0, output: tuple[int, ...] = ()) -> SequenceSpec:
    return SequenceSpec(
        transfer=TransferId(request.request_id, attempt),
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        choices=tuple(range(request.sampling.n)),
        output_token_ids=output,
        eos_token_ids=request.eos_token_ids,
        cache_salt=request.cache_salt,
    )


def held(
    leg: Leg,
    spec: SequenceSpec,
    num_tokens: int = 0,
    *,
    partner: bool = True,
    error: str | None = "",
    last: bool = False,
) -> HeldLeg:
    """Returns a leg that has produced tokens; `error` is its error when it has ended, or None."""
    first = len(spec.output_token_ids)
    outputs = tuple(
        TokenOutput(
            spec.transfer,
            0,
            index,
            100 + index,
            FinishReason.LENGTH if last and index == first + num_tokens - 1 else None,
        )
        for index in range(first, first + num_tokens)
    )
    ended = (
        None
        if error == ""
        else LegEnded(worker_id=WHO[leg], incarnation=1, transfer=spec.transfer, leg=leg, error=error)
    )
    return HeldLeg.of(spec, leg, outputs, has_partner=partner, ended=ended)


WHO = {Leg.PREFILL: "prefill-0", Leg.DECODE: "decode-0"}


class Successor(Cluster):
    """A cluster whose router takes over workers that hold these legs."""

    def __init__(self, *legs: HeldLeg) -> None:
        super().__init__()
        self.router = Router(first_attempt=FIRST_ATTEMPT, adopts=True)
        for leg, worker_id in WHO.items():
            self.incarnations[worker_id] = 1
            self.handle(WorkerReady(worker_info(worker_id), tuple(of for of in legs if of.leg is leg)))
        self.handle(Adopted())


def test_an_adopted_stream_continues_and_its_client_gets_all_of_it() -> None:
    request = make_request(max_tokens=6)
    spec = spec_of(request)
    cluster = Successor(held(Leg.PREFILL, spec, 1, error=None), held(Leg.DECODE, spec, 3))
    assert not cluster.tokens["r", 0]
    cluster.report("decode-0", TokenOutput(spec.transfer, 0, 3, 103))
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3]
    cluster.report(
        "decode-0",
        TokenOutput(spec.transfer, 0, 4, 104),
        TokenOutput(spec.transfer, 0, 5, 105, FinishReason.LENGTH),
    )
    cluster.leg_ended("decode-0", Leg.DECODE, transfer=spec.transfer)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3, 4, 5]
    assert len(cluster.ends["r"]) == len(cluster.closed["r"]) == 1
    assert not cluster.sent


def test_replayed_tokens_make_no_gaps_and_the_timeline_marks_the_take_over() -> None:
    request = make_request(max_tokens=5)
    spec = spec_of(request)
    cluster = Successor(held(Leg.DECODE, spec, 3, partner=False))
    cluster.submit(request)
    cluster.now_s = 2.0
    cluster.report("decode-0", TokenOutput(spec.transfer, 0, 3, 103))
    gaps = cluster.router.token_gaps
    assert (gaps.num_measured, gaps.total) == (1, 2.0)
    assert cluster.router.counters.tokens == 1
    timeline = cluster.router.timeline("r", 2.0)
    assert timeline is not None
    assert timeline.is_adopted
    assert timeline.dispatches[0].considered == ()


def test_a_client_that_comes_back_brings_its_user_along() -> None:
    request = make_request(max_tokens=5)
    cluster = Successor(held(Leg.DECODE, spec_of(request), 3, partner=False))
    cluster.submit(msgspec.structs.replace(request, user="alice", client="key:alice"))
    assert cluster.tokens["r", 0] == [0, 1, 2]
    timeline = cluster.router.timeline("r", 0.0)
    assert timeline is not None and timeline.user == "alice"
    assert not cluster.sent  # nothing is computed again


@pytest.mark.parametrize("what", ["has_tools", "only_scores"])
def test_fields_of_the_gateway_alone_do_not_prevent_a_claim(what: str) -> None:
    """No worker knows of it."""
    request = make_request(max_tokens=6)
    spec = spec_of(request)
    cluster = Successor(held(Leg.PREFILL, spec, 1, error=None), held(Leg.DECODE, spec, 3))
    cluster.submit(msgspec.structs.replace(request, **{what: True}))
    assert len(cluster.tokens["r", 0]) == 3


def test_a_request_that_ended_without_a_router_waits_for_its_client() -> None:
    request = make_request(max_tokens=3)
    spec = spec_of(request)
    cluster = Successor(held(Leg.DECODE, spec, 3, partner=False, error=None, last=True))
    assert not cluster.ends["r"]
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1, 2]
    assert cluster.choice_ends["r", 0] == [FinishReason.LENGTH]
    assert len(cluster.ends["r"]) == 1


def test_tokens_of_a_lost_leg_are_not_recomputed() -> None:
    request = make_request(max_tokens=6)
    cluster = Successor(held(Leg.DECODE, spec_of(request), 2, error="its pool is gone"))
    assert not cluster.sent  # no client asks for the rest yet
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1]
    assert cluster.spec("decode-0").output_token_ids == (100, 101)
    assert cluster.spec("decode-0").transfer.attempt >= FIRST_ATTEMPT


@pytest.mark.parametrize("leg", Leg)
def test_a_leg_whose_partner_is_gone_is_ended(leg: Leg) -> None:
    spec = spec_of(make_request())
    cluster = Successor(held(leg, spec))
    assert cluster.aborts(WHO[leg]) == [spec.transfer]


def test_a_single_token_prefill_ends_when_no_worker_takes_its_kv() -> None:
    spec = spec_of(make_request(max_tokens=6))
    cluster = Successor(held(Leg.PREFILL, spec, 1, last=True))
    assert cluster.aborts("prefill-0") == [spec.transfer]
    cluster.leg_ended("prefill-0", Leg.PREFILL, "cancelled", transfer=spec.transfer)
    cluster.submit(make_request(max_tokens=6))
    assert cluster.tokens["r", 0] == [0]
    assert len(cluster.ends["r"]) == len(cluster.closed["r"]) == 1


def test_a_decode_leg_that_has_its_kv_needs_no_partner() -> None:
    assert not Successor(held(Leg.DECODE, spec_of(make_request()), 1)).sent


def test_of_two_dispatches_of_a_choice_the_newer_continues() -> None:
    request = make_request(max_tokens=6)
    older, newer = spec_of(request, 3), spec_of(request, 5, output=(100,))
    cluster = Successor(held(Leg.DECODE, older, 2, partner=False), held(Leg.DECODE, newer, 3, partner=False))
    assert cluster.aborts("decode-0") == [older.transfer]
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1, 2, 3]


def test_a_request_whose_client_does_not_come_back_is_ended() -> None:
    spec = spec_of(make_request())
    cluster = Successor(held(Leg.DECODE, spec, 1, partner=False))
    due_s = cluster.router.next_tick_s()
    assert due_s == cluster.router.config.claim_timeout_s
    cluster.now_s = due_s
    cluster.handle(Tick())
    assert cluster.aborts("decode-0") == [spec.transfer]
    cluster.leg_ended("decode-0", Leg.DECODE, "aborted", transfer=spec.transfer)
    assert len(cluster.closed["r"]) == 1


def test_streams_that_nobody_claims_are_abandoned_in_slices() -> None:
    specs = [spec_of(make_request(f"r{number}")) for number in range(200)]
    cluster = Successor(*(held(Leg.DECODE, spec, 1, partner=False) for spec in specs))
    while cluster.router.is_adopting:
        cluster.tick()
    cluster.tick(cluster.router.config.claim_timeout_s)
    num_in_a_turn = len(cluster.aborts("decode-0"))
    assert 0 < num_in_a_turn < 100
    cluster.submit(make_request("r199"))
    while (due_s := cluster.router.next_tick_s()) is not None and due_s <= cluster.now_s:
        num_before = len(cluster.aborts("decode-0"))
        cluster.tick()
        assert len(cluster.aborts("decode-0")) - num_before <= num_in_a_turn
    assert cluster.aborts("decode-0") == [spec.transfer for spec in specs[:-1]], "the last was claimed"


def test_a_different_request_with_a_served_id_is_refused() -> None:
    cluster = Successor(held(Leg.DECODE, spec_of(make_request()), 1, partner=False))
    with pytest.raises(DuplicateRequest):
        cluster.submit(make_request(num_tokens=21))


def test_a_different_request_replaces_an_unserved_one_with_its_id() -> None:
    cluster = Successor(held(Leg.DECODE, spec_of(make_request()), 1, error="broken"))
    cluster.submit(make_request(num_tokens=21))
    assert not cluster.tokens["r", 0]
    assert not cluster.ends["r"]
    assert any(
        isinstance(command, Prefill | Reserve | Serve)
        for commands in cluster.sent.values()
        for command in commands
    )


@pytest.mark.parametrize("which", ["logprobs", "prompt_logprobs"])
def test_lost_log_probabilities_are_recomputed(which: str) -> None:
    request = make_request()
    request = Request(
        request_id="r",
        prompt_token_ids=request.prompt_token_ids,
        sampling=type(request.sampling)(max_tokens=4, **{which: 1}),  # type: ignore[arg-type]
    )
    spec = spec_of(request, 2, output=(100,))
    cluster = Successor(held(Leg.DECODE, spec, 1, partner=False))
    assert cluster.aborts("decode-0") == [spec.transfer]
    cluster.submit(request)
    assert cluster.tokens["r", 0] == []


def test_nothing_is_admitted_before_every_worker_has_reported() -> None:
    router = Router(adopts=True)
    router.handle(WorkerReady(worker_info("both-0")), 0.0)
    with pytest.raises(NoWorkerAvailable):
        router.handle(Submit(make_request()), 0.0)
    router.handle(Adopted(), 0.0)
    assert router.handle(Submit(make_request()), 0.0)


def test_a_worker_lost_during_adoption_takes_only_its_own_legs() -> None:
    request = make_request(max_tokens=6)
    cluster = Successor()
    cluster.router = Router(first_attempt=FIRST_ATTEMPT, adopts=True)
    cluster.handle(WorkerReady(worker_info("decode-0"), (held(Leg.DECODE, spec_of(request), 2),)))
    cluster.handle(WorkerLost("decode-0", 1, "killed"))
    cluster.handle(WorkerReady(worker_info("prefill-0")))
    cluster.handle(Adopted())
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1]
    assert cluster.spec("prefill-0").output_token_ids == (100, 101)


def test_a_worker_that_reconnects_during_adoption_is_not_lost() -> None:
    spec = spec_of(make_request(max_tokens=6))
    cluster = Successor()
    cluster.router = Router(first_attempt=FIRST_ATTEMPT, adopts=True)
    cluster.handle(WorkerLost("decode-0", 1, "connection reset"))
    cluster.handle(WorkerReady(worker_info("decode-0"), (held(Leg.DECODE, spec, 2, partner=False),)))
    cluster.handle(Adopted())
    assert [worker.worker_id for worker in cluster.router.status(0.0).workers] == ["decode-0"]
    cluster.submit(make_request(max_tokens=6))
    cluster.report("decode-0", TokenOutput(spec.transfer, 0, 2, 102))
    assert cluster.tokens["r", 0] == [0, 1, 2]


def test_a_refused_request_leaves_an_unclaimed_one_with_its_id_alone() -> None:
    request = make_request(max_tokens=3)
    cluster = Successor(held(Leg.DECODE, spec_of(request), 3, partner=False, error=None, last=True))
    with pytest.raises(NoWorkerAvailable):
        cluster.submit(make_request(num_tokens=100_000))
    cluster.submit(request)
    assert cluster.tokens["r", 0] == [0, 1, 2]
    assert len(cluster.closed["r"]) == 1


def test_an_unclaimed_stream_makes_room_and_waits_for_its_client() -> None:
    requests = [make_request(name, max_tokens=6) for name in ("first", "second")]
    specs = [
        msgspec.structs.replace(spec_of(request, attempt), client="much")
        for attempt, request in enumerate(requests)
    ]
    cluster = Cluster()
    cluster.router = Router(first_attempt=FIRST_ATTEMPT, adopts=True)
    cluster.incarnations["both-0"] = 1
    legs = tuple(held(Leg.DECODE, spec, 2, partner=False) for spec in specs)
    cluster.handle(WorkerReady(worker_info("both-0", max_batch_size=2), legs))
    cluster.handle(Adopted())
    cluster.submit(make_request("newcomer", client="little"))
    assert cluster.aborts("both-0") == [specs[1].transfer]
    cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=specs[1].transfer)
    assert cluster.spec("both-0").transfer.request_id == "newcomer"
    assert cluster.router.status(0.0).num_queued == 0
    cluster.submit(msgspec.structs.replace(requests[1], client="much"))
    assert cluster.tokens["second", 0] == [0, 1]
    assert cluster.router.status(0.0).num_queued == 1


def scored(spec: SequenceSpec, num_tokens: int) -> HeldLeg:
    outputs = [TokenOutput(spec.transfer, 0, index, 100 + index, logprob=-1.0) for index in range(num_tokens)]
    return HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False)


def test_a_take_over_is_cut_into_turns_between_which_others_are_heard() -> None:
    """A turn replays no more than some legs, however many there are, or a slice of what has more beside its
    tokens."""
    requests = [make_request(f"r{number}", max_tokens=100) for number in range(5)]
    legs = tuple(scored(spec_of(request), 50) for request in requests)
    router = Router(RouterConfig(take_over_tokens=40), first_attempt=FIRST_ATTEMPT, adopts=True)
    router.handle(WorkerReady(worker_info("decode-0"), legs), 0.0)
    router.handle(Adopted(), 0.0)
    spec = legs[0].spec
    report = StepReport(
        worker_id="decode-0",
        incarnation=1,
        load=WorkerLoad(),
        outputs=(TokenOutput(spec.transfer, 0, 50, 150),),
    )
    num_turns, seen = 0, [router.num_live]
    while router.is_adopting:
        assert router.next_tick_s() == 0.0
        if num_turns == 2:
            router.handle(report, 0.0)
            with pytest.raises(NoWorkerAvailable):
                router.handle(Submit(requests[0]), 0.0)
        router.handle(Tick(), 0.0)
        num_turns += 1
        seen.append(router.num_live)
        router.check_integrity()
    assert num_turns >= 5 * 2 and max(b - a for a, b in pairwise(seen)) == 1
    commands = router.handle(Submit(requests[0]), 0.0)
    tokens = [token.index for one in commands if isinstance(one, EmitTokens) for token in one.tokens]
    assert tokens == list(range(51)), "what came meanwhile follows"


@pytest.mark.parametrize("is_scored", [False, True])
def test_tokens_of_legs_that_overlap_come_once_whatever_is_beside_them(is_scored: bool) -> None:
    request = make_request(max_tokens=9)
    first, second = spec_of(request), spec_of(request, 1, (100, 101, 102))
    legs = [held(Leg.DECODE, first, 6, partner=False), held(Leg.DECODE, second, 2, partner=False)]
    if is_scored:
        legs = [scored(first, 6), legs[1]]
    cluster = Successor(*legs)
    cluster.report(
        "decode-0", TokenOutput(second.transfer, 0, 5, 105), TokenOutput(second.transfer, 0, 6, 106)
    )
    commands = cluster.submit(request)
    tokens = [token for one in commands if isinstance(one, EmitTokens) for token in one.tokens]
    assert [(token.index, token.token_id) for token in tokens] == [(at, 100 + at) for at in range(7)]


def test_another_prompt_of_the_same_length_is_another_request() -> None:
    request = make_request(max_tokens=9)
    cluster = Successor(held(Leg.DECODE, spec_of(request), 3, partner=False))
    with pytest.raises(DuplicateRequest):
        cluster.submit(msgspec.structs.replace(request, prompt_token_ids=request.prompt_token_ids[::-1]))


def test_an_adopting_router_waits_for_reports_of_what_is_cached() -> None:
    router = Router(first_attempt=FIRST_ATTEMPT, adopts=True)
    router.handle(WorkerReady(worker_info("decode-0"), (), num_cached_blocks=3), 0.0)
    slices = ((b"one", b"two"), (b"three",))
    for hashes, num_left in zip(slices, (1, 0), strict=True):
        load = WorkerLoad(num_unreported_blocks=num_left)
        router.handle(StepReport(worker_id="decode-0", incarnation=1, load=load, blocks_added=hashes), 0.0)
    assert not router.known_blocks("decode-0")
    router.handle(Adopted(), 0.0)
    assert router.known_blocks("decode-0") == set(block_keys([b"one", b"two", b"three"]))
