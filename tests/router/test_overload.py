"""Overload: refused requests, queueing among clients, requests given up, and slow readers."""

import msgspec
import pytest

from pdserve.core.errors import NoWorkerAvailable, QueueFull
from pdserve.core.messages import Leg, Reserve, StepReport, StepTiming, WorkerLoad
from pdserve.core.request import FinishReason, Request, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.events import (
    Cancel,
    Closing,
    StreamRead,
    StreamUnread,
    WorkerDraining,
    WorkerIdle,
    WorkersExpected,
)
from pdserve.router.live_request import DispatchState
from pdserve.router.waiting import REVIEW_S

from .cluster import Cluster, make_request, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None, max_prefill_backlog_tokens=1)


def request_of(client: str, request_id: str, num_tokens: int = 20, **values: object) -> Request:
    request = make_request(request_id, num_tokens, **values)  # type: ignore[arg-type]
    return Request(
        **{name: getattr(request, name) for name in request.__struct_fields__} | {"client": client}
    )


def one_at_a_time(max_queued_requests: int = 1024) -> Cluster:
    """A cluster of one worker whose room for one sequence is taken."""
    config = RouterConfig(max_queued_requests=max_queued_requests)
    cluster = Cluster(worker_info("both-0", max_batch_size=1), config=config)
    cluster.submit(make_request("running", max_tokens=1))
    return cluster


def finish(cluster: Cluster, worker_id: str = "both-0") -> str:
    """Ends the one-token request that is running there; returns the next running one."""
    transfer = cluster.spec(worker_id).transfer
    cluster.token(worker_id, 0, FinishReason.LENGTH)
    cluster.leg_ended(worker_id, Leg.PREFILL, transfer=transfer)
    return cluster.spec(worker_id).transfer.request_id


def teach(cluster: Cluster, token_s: float, count: int = 20) -> None:
    """Reports prefills of 100 tokens on prefill-0, each of the given duration."""
    timing = StepTiming(
        duration_s=100 * token_s,
        num_prefill_tokens=100,
        sum_prefill_squares=10_000,
        num_decode_sequences=0,
        num_context_tokens=0,
    )
    for _ in range(count):
        cluster.handle(StepReport(worker_id="prefill-0", incarnation=1, load=WorkerLoad(), timing=timing))


# fairness


def test_a_single_request_waits_for_one_request_of_another_client() -> None:
    cluster = one_at_a_time()
    for number in range(100):
        cluster.submit(request_of("many", f"m{number}", 256, max_tokens=1))
    cluster.submit(request_of("one", "single", max_tokens=1))
    served = [finish(cluster) for _ in range(4)]
    assert served == ["m0", "single", "m1", "m2"]


def test_short_and_long_prompts_of_two_clients_both_progress() -> None:
    cluster = one_at_a_time()
    for number in range(3):
        cluster.submit(request_of("long", f"long{number}", 2000, max_tokens=1, first_token=5000 * number))
    for number in range(200):
        cluster.submit(request_of("short", f"short{number}", 50, max_tokens=1))
    served = [finish(cluster) for _ in range(150)]
    first, second, third = (served.index(f"long{number}") for number in range(3))
    assert first <= 50
    assert 20 <= second - first <= 50
    assert 20 <= third - second <= 50


def test_a_full_queue_keeps_places_for_clients_that_have_nothing_in_it() -> None:
    cluster = one_at_a_time(max_queued_requests=16)
    for number in range(14):
        cluster.submit(request_of("many", f"m{number}"))
    with pytest.raises(QueueFull):
        cluster.submit(request_of("many", "m14"))
    cluster.submit(request_of("a", "a"))
    cluster.submit(request_of("b", "b"))
    with pytest.raises(QueueFull):
        cluster.submit(request_of("c", "c"))


def test_retries_go_first_and_are_not_charged_again() -> None:
    cluster = Cluster("both-0")
    cluster.submit(request_of("a", "a", 500))
    cluster.lose("both-0")
    cluster.submit(request_of("b", "b"))
    cluster.add(worker_info("both-0", incarnation=2, max_batch_size=1))
    assert cluster.spec("both-0").transfer == TransferId("a", 1)


def shares(*specs: tuple[str, int, int, int, float], num_tokens: int = 20_000) -> dict[str, int]:
    """Serves backlogged clients of (name, prompt tokens, output tokens, choices, weight), four choices at a
    time, until one of them has had `num_tokens`; returns what each has had, by the queue's measure."""
    cluster = Cluster(worker_info("both-0", max_batch_size=4, num_blocks=4096))
    had: dict[str, int] = {name: 0 for name, *_ in specs}
    number = 0
    while max(had.values()) < num_tokens:
        for name, length, max_tokens, n, weight in specs:
            while cluster.router._queue._fair.num_queued(name) < 4:
                number += 1
                request = make_request(
                    f"{name}{number}",
                    length,
                    max_tokens=max_tokens,
                    n=n,
                    client=name,
                    first_token=number * 10_000,
                )
                cluster.submit(msgspec.structs.replace(request, weight=weight))
        worker = cluster.router._registry.get("both-0")
        assert worker is not None
        for transfer in list(worker.open_legs):
            dispatch = cluster.router._ledger.get(transfer)
            assert dispatch is not None
            spec, name = dispatch.spec, dispatch.spec.client
            if dispatch.state is DispatchState.FAILED:  # it made room for the other client
                cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=transfer)
                continue
            index = len(cluster.tokens[transfer.request_id, spec.choices[0]])
            had[name] += 2 * len(spec.choices) + (spec.num_tokens if index == 0 else 0)
            is_last = index == spec.sampling.max_tokens - 1
            for choice in spec.choices:
                reason = FinishReason.LENGTH if is_last else None
                cluster.output("both-0", transfer, index, reason, choice=choice)
            if is_last:
                cluster.leg_ended("both-0", dispatch.leg_at(worker), transfer=transfer)
    return had


@pytest.mark.parametrize(
    "other",
    [("b", 500, 50, 1, 1.0), ("b", 10, 5, 1, 1.0), ("b", 10, 50, 4, 1.0), ("b", 200, 1, 1, 1.0)],
    ids=["long prompts", "short outputs", "four choices", "prompts alone"],
)
def test_backlogged_clients_get_equal_tokens_of_prompt_and_output(
    other: tuple[str, int, int, int, float],
) -> None:
    had = shares(("a", 10, 200, 2, 1.0), other)
    assert had["a"] == pytest.approx(had["b"], rel=0.15)


def test_a_client_gets_tokens_by_its_weight() -> None:
    had = shares(("a", 10, 50, 1, 3.0), ("b", 40, 30, 1, 1.0))
    assert had["a"] == pytest.approx(3 * had["b"], rel=0.15)


def test_work_that_comes_back_is_charged_once() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(request_of("a", "a", 500, max_tokens=9))
    counters = cluster.router._queue.counters
    (first,) = (name for name, num in cluster.num_legs().items() if num)
    cluster.token(first, 0)
    assert counters.of("a") == 502
    cluster.lose(first)
    assert counters.of("a") == 502
    (second,) = (name for name, num in cluster.num_legs().items() if num)
    cluster.token(second, 0)
    cluster.token(second, 1)
    assert counters.of("a") == 504


def test_a_client_at_its_bound_waits_while_others_pass() -> None:
    cluster = Cluster(worker_info("both-0"), config=RouterConfig(max_running_per_client=2))
    for number in range(4):
        cluster.submit(request_of("a", f"a{number}"))
    cluster.submit(request_of("b", "b"))
    running = [command.spec.transfer.request_id for command in cluster.sent["both-0"]]  # type: ignore[union-attr]
    assert running == ["a0", "a1", "b"]
    transfer = TransferId("a0", 0)
    cluster.output("both-0", transfer, 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE, transfer=transfer)
    assert cluster.spec("both-0").transfer.request_id == "a2"


def test_one_request_may_exceed_its_clients_bound_alone() -> None:
    cluster = Cluster(worker_info("both-0"), config=RouterConfig(max_running_per_client=2))
    cluster.submit(request_of("a", "many", n=4))
    assert cluster.spec("both-0").transfer.request_id == "many"


def with_priority(request: Request, priority: int) -> Request:
    return msgspec.structs.replace(request, priority=priority)


def test_a_lower_number_is_served_first_and_displaces_a_higher_one() -> None:
    cluster = Cluster(worker_info("both-0", max_batch_size=1))
    cluster.submit(with_priority(request_of("a", "low", max_tokens=40), 5))
    cluster.submit(request_of("b", "middle"))
    assert cluster.aborts("both-0") == [TransferId("low", 0)]
    cluster.submit(with_priority(request_of("c", "high"), -5))
    cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=TransferId("low", 0))
    assert cluster.spec("both-0").transfer.request_id == "high"
    cluster.token("both-0", 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.spec("both-0").transfer.request_id == "middle"


def test_a_request_gives_up_its_place_three_times_at_most() -> None:
    cluster = Cluster(worker_info("both-0", max_batch_size=1))
    cluster.submit(with_priority(request_of("a", "low", max_tokens=40), 5))
    for number in range(3):
        low = cluster.spec("both-0").transfer
        assert low.request_id == "low"
        cluster.submit(request_of("b", f"high{number}"))
        assert low in cluster.aborts("both-0")
        cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=low)
        high = cluster.spec("both-0").transfer
        cluster.output("both-0", high, 0, FinishReason.STOP)
        cluster.leg_ended("both-0", Leg.DECODE, transfer=high)
    low = cluster.spec("both-0").transfer
    cluster.submit(request_of("b", "high3"))
    assert low not in cluster.aborts("both-0")


def test_a_large_backlog_of_high_priority_leaves_one_place_in_eight() -> None:
    cluster = one_at_a_time()
    cluster.submit(with_priority(request_of("a", "low", max_tokens=1), 5))
    for number in range(20):
        cluster.submit(with_priority(request_of("b", f"high{number}", max_tokens=1), -5))
    served = [finish(cluster) for _ in range(10)]
    assert served.index("low") == 7


# the retry delay


def retry_after_s(cluster: Cluster) -> float:
    with pytest.raises(QueueFull) as error:
        cluster.submit(make_request("refused", 1000))
    return error.value.retry_after_s


def test_before_any_dispatch_the_retry_delay_is_predicted_from_the_backlog() -> None:
    starting = Cluster(config=RouterConfig(max_queued_requests=3))
    starting.handle(WorkersExpected(1))
    for name in "abc":
        starting.submit(make_request(name))
    assert retry_after_s(starting) == 3 * 1.0
    cold = one_at_a_time(max_queued_requests=3)
    for name in "abc":
        cold.submit(make_request(name))
    assert retry_after_s(cold) == pytest.approx(3 * cold.router.model.prefill_s(1000, 1000**2))


def test_the_delay_grows_while_nothing_is_dispatched() -> None:
    cluster = one_at_a_time(max_queued_requests=4)
    for name in "abcd":
        cluster.submit(make_request(name, max_tokens=1))
    for _ in range(2):
        cluster.now_s += 0.5
        finish(cluster)
    for name in "ef":
        cluster.submit(make_request(name))
    assert retry_after_s(cluster) == pytest.approx(4 * 0.5)
    cluster.now_s += 10.5
    assert retry_after_s(cluster) == pytest.approx(4 * 1.5)


# deadlines


def test_a_deadline_that_has_passed_ends_a_request_at_once() -> None:
    cluster = Cluster("both-0")
    cluster.now_s = 5.0
    cluster.submit(make_request("late", deadline_s=4.0))
    assert cluster.choice_ends["late", 0] == [FinishReason.DEADLINE]
    assert not cluster.sent["both-0"]


def behind_a_long_prompt(deadline_s: float, *, learnt: bool = True) -> Cluster:
    """A cluster in which a request with a deadline waits behind a prefill of 1000 tokens, which takes a
    second."""
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    teach(cluster, 1e-3, 40 if learnt else 2)
    cluster.submit(make_request("long", 1000))
    cluster.submit(make_request("hurried", first_token=5000, deadline_s=deadline_s))
    return cluster


def test_a_request_predicted_to_miss_its_deadline_costs_no_prefill() -> None:
    cluster = behind_a_long_prompt(deadline_s=0.3)
    assert cluster.ends["hurried"][0].finish_reason is FinishReason.DEADLINE
    assert cluster.spec("prefill-0").transfer.request_id == "long"
    assert cluster.router.counters.hopeless == 1


@pytest.mark.parametrize(("deadline_s", "learnt"), [(0.8, True), (0.3, False)])
def test_a_close_or_unlearnt_prediction_gives_up_no_request(deadline_s: float, learnt: bool) -> None:
    cluster = behind_a_long_prompt(deadline_s, learnt=learnt)
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"


def test_nothing_is_given_up_before_a_worker_has_reported_what_it_caches() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    teach(cluster, 1e-3, 40)
    load = WorkerLoad(num_unreported_blocks=70)
    cluster.handle(StepReport(worker_id="prefill-0", incarnation=1, load=load))
    cluster.submit(make_request("long", 1000))
    cluster.submit(make_request("hurried", first_token=5000, deadline_s=0.3))
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"
    cluster.report("prefill-0")  # the last of them
    cluster.submit(make_request("late", first_token=9000, deadline_s=0.3))
    assert cluster.router.counters.hopeless == 1


def test_a_request_on_an_idle_worker_corrects_a_pessimistic_model() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    teach(cluster, 1.0, 40)
    cluster.submit(make_request("hurried", 100, deadline_s=0.5))
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"


# one client has all places


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


# clients that do not read


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


# the cluster's end


def test_shutdown_refuses_new_and_waiting_requests_and_finishes_running_ones() -> None:
    cluster = one_at_a_time()
    cluster.submit(make_request("waiting"))
    cluster.handle(Closing())
    with pytest.raises(NoWorkerAvailable, match="shutting down"):
        cluster.submit(make_request("new"))
    cluster.handle(WorkerDraining("both-0"))
    (end,) = cluster.ends["waiting"]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "the cluster is shutting down")
    cluster.token("both-0", 0, FinishReason.LENGTH)
    assert WorkerIdle("both-0", 1) in cluster.leg_ended("both-0", Leg.PREFILL)
    assert cluster.choice_ends["running", 0] == [FinishReason.LENGTH]


def test_a_draining_prefill_worker_is_not_idle_before_its_kv_is_sent() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("a"))
    cluster.handle(WorkerDraining("prefill-0"))
    assert WorkerIdle("prefill-0", 1) not in cluster.token("prefill-0", 0)
    assert WorkerIdle("prefill-0", 1) in cluster.leg_ended("prefill-0", Leg.PREFILL)


def test_streams_of_a_worker_stopped_after_the_drain_timeout_continue_elsewhere() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=PAIRS_ONLY)
    cluster.submit(make_request("a"))
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.token("decode-0", 1)
    cluster.handle(WorkerDraining("decode-0"))
    cluster.lose("decode-0")
    assert cluster.spec("decode-1").output_token_ids == (100, 101)
    cluster.token("prefill-0", 2)
    assert cluster.tokens["a", 0] == [0, 1, 2]


def test_streams_that_outlast_a_cluster_end_as_unavailable() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a"))
    cluster.handle(Closing())
    for worker_id in ("both-0", "both-1"):
        cluster.handle(WorkerDraining(worker_id))
    for worker_id in ("both-0", "both-1"):
        cluster.lose(worker_id)
    (end,) = cluster.ends["a"]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "the cluster is shutting down")
