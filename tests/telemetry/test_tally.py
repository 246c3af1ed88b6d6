"""The effects of requests, steps and transfers on the metrics, read through a scrape's exposition."""

from typing import cast

import pytest

from pdserve.core.errors import QueueFull
from pdserve.core.failures import FailureKind
from pdserve.core.messages import Leg, Reserve, Role, StepReport, TokenOutput, WorkerLoad
from pdserve.core.request import FinishReason
from pdserve.router.config import RouterConfig
from pdserve.router.events import Cancel, StreamUnread, Tick, Timeline, WorkerRole

from ..router.cluster import make_request
from .support import STATS, Watched, timing

STEPS = (
    ("decode", "decode"),
    ("prefill", "prefill"),
    ("decode", "mixed"),
)  # their pools, and the computation of each


@pytest.fixture
def cluster() -> Watched:
    return Watched("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))


def serve(
    cluster: Watched, request_id: str = "r", num_tokens: int = 3, gap_s: float = 0.01, finish: bool = True
) -> None:
    """A request of 20 tokens: 10 ms of queue at its worker, 25 ms of prefill, 5 more until its first token is
    here."""
    cluster.submit(make_request(request_id, 20, max_tokens=num_tokens))
    cluster.now_s += 0.04
    cluster.token("prefill-0", 0)
    cluster.now_s += 0.006
    cluster.token("decode-0", 0)  # comes again with the KV
    cluster.end_leg(
        "prefill-0", Leg.PREFILL, num_cached_tokens=16, queue_s=0.01, compute_s=0.025, stats=STATS
    )
    cluster.now_s -= 0.006
    for index in range(1, num_tokens):
        cluster.now_s += gap_s
        cluster.token("decode-0", index, FinishReason.LENGTH if finish and index == num_tokens - 1 else None)
    if finish:
        cluster.end_leg("decode-0", Leg.DECODE, queue_s=0.046, compute_s=gap_s * (num_tokens - 1))


def test_one_request_is_counted_once_in_each_of_its_parts(cluster: Watched) -> None:
    serve(cluster)
    values = cluster.values()
    once = (
        "requests_admitted_total",
        "dispatches_total",
        'request_success_total{finished_reason="length"}',
        "time_to_first_token_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
        'request_worker_queue_time_seconds_count{pool="prefill"}',
        'request_prefill_time_seconds_count{pool="prefill"}',
        "request_overhead_time_seconds_count",
        "request_kv_wait_time_seconds_count",
        "request_decode_time_seconds_count",
        "kv_transfer_bytes_count",
        "kv_transfer_seconds_count",
        "kv_transfer_exposed_seconds_count",
        "request_time_per_output_token_seconds_count",
        'prediction_ratio_count{of="ttft"}',
        'prediction_ratio_count{of="transfer"}',
        'prediction_ratio_count{of="itl"}',
        'slo_requests_total{itl="met",ttft="met"}',
    )
    assert {name: values.get(name) for name in once} == dict.fromkeys(once, 1.0)
    assert values["prompt_tokens_total"] == values['prefix_cache_queries_total{pool="prefill"}'] == 20
    assert values['prefix_cache_hits_total{pool="prefill"}'] == 16
    assert values["generation_tokens_total"] == values["request_generation_tokens_sum"] == 3


def test_the_parts_of_ttft_add_up_to_it(cluster: Watched) -> None:
    serve(cluster)
    values = cluster.values()
    at_worker = '{pool="prefill"}'
    parts = {
        part: values.get(f"request_{part}_time_seconds_sum{labels}", 0.0)
        for part, labels in (
            ("queue", ""),
            ("worker_queue", at_worker),
            ("prefill", at_worker),
            ("overhead", ""),
        )
    }
    assert parts == pytest.approx({"queue": 0.0, "worker_queue": 0.01, "prefill": 0.025, "overhead": 0.005})
    assert values["time_to_first_token_seconds_sum"] == pytest.approx(sum(parts.values()))
    assert values["request_kv_wait_time_seconds_sum"] == pytest.approx(0.006)
    assert values["e2e_request_latency_seconds_sum"] == pytest.approx(0.06)
    assert values["request_decode_time_seconds_sum"] == pytest.approx(0.02)


def test_a_gap_is_counted_for_every_token_after_the_first(cluster: Watched) -> None:
    serve(cluster, num_tokens=5, gap_s=0.02)
    values = cluster.values()
    assert values["inter_token_latency_seconds_count"] == 4
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(0.08)
    assert values["generation_tokens_total"] == 5


def test_streams_of_one_report_are_counted_each_with_its_own_gap(cluster: Watched) -> None:
    cluster.submit(make_request("old", max_tokens=9))
    cluster.token("prefill-0", 0)
    cluster.submit(make_request("new", max_tokens=9))
    cluster.now_s = 1.0
    cluster.token("prefill-0", 0)
    cluster.now_s = 3.0
    old, new = (command.spec.transfer for command in cast(list[Reserve], cluster.sent["decode-0"]))
    cluster.report("decode-0", TokenOutput(old, 0, 1, 7), TokenOutput(new, 0, 1, 7))
    values = cluster.values()
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(3.0 + 2.0)
    assert values["inter_token_latency_seconds_count"] == 2


def test_a_pause_is_not_a_gap_and_unread_streams_are_not_judged(cluster: Watched) -> None:
    serve(cluster, num_tokens=2, finish=False)
    cluster.handle(StreamUnread("r"))
    cluster.now_s += 60.0
    before = cluster.values()["inter_token_latency_seconds_count"]
    cluster.handle(Cancel("r"))
    assert cluster.values()["inter_token_latency_seconds_count"] == before
    assert not [name for name in cluster.values() if name.startswith("slo_requests")]


@pytest.mark.parametrize(
    ("gap_s", "wait_s", "verdict"),
    [
        (0.01, 0.0, 'itl="met",ttft="met"'),
        (0.08, 0.0, 'itl="missed",ttft="met"'),
        (0.01, 0.3, 'itl="met",ttft="missed"'),
        (0.08, 0.3, 'itl="missed",ttft="missed"'),
    ],
)
def test_goodput_judges_the_first_token_and_the_mean_gap(gap_s: float, wait_s: float, verdict: str) -> None:
    cluster = Watched("decode-0")
    cluster.submit(make_request(max_tokens=3))
    cluster.now_s = wait_s
    for index in range(3):
        cluster.token("decode-0", index, FinishReason.LENGTH if index == 2 else None)
        cluster.now_s += gap_s
    cluster.end_leg("decode-0", Leg.DECODE)
    assert cluster.values()[f"slo_requests_total{{{verdict}}}"] == 1


def test_a_request_that_misses_its_deadline_misses_both_objectives(cluster: Watched) -> None:
    cluster.submit(make_request(deadline_s=1.0))
    cluster.now_s = 1.0
    cluster.handle(Tick())
    for worker_id, leg in (("prefill-0", Leg.PREFILL), ("decode-0", Leg.DECODE)):
        cluster.end_leg(worker_id, leg, error="aborted")
    values = cluster.values()
    assert values['slo_requests_total{itl="missed",ttft="missed"}'] == 1
    assert (
        values["requests_expired_total"] == values['request_success_total{finished_reason="deadline"}'] == 1
    )
    assert "e2e_request_latency_seconds_count" not in values


def test_refused_requests_are_counted_and_not_admitted(cluster: Watched) -> None:
    cluster.router.configure(RouterConfig(max_queued_requests=1, max_prefill_backlog_tokens=1))
    cluster.submit(make_request("served"))
    cluster.submit(make_request("queued"))
    with pytest.raises(QueueFull):
        cluster.submit(make_request("refused"))
    values = cluster.values()
    assert (
        values["requests_admitted_total"],
        values["requests_rejected_total"],
        values["num_requests_queued"],
    ) == (2, 1, 1)


def test_a_lost_worker_makes_a_retry_and_a_resumed_stream() -> None:
    cluster = Watched("prefill-0", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.submit(make_request(max_tokens=3))
    cluster.token("prefill-0", 0)
    (decoder,) = (name for name in ("decode-0", "decode-1") if cluster.sent[name])
    cluster.token(decoder, 1)
    first = cluster.spec("prefill-0").transfer
    cluster.lose(decoder)
    cluster.leg_ended("prefill-0", Leg.PREFILL, "aborted", transfer=first)
    cluster.token("prefill-0", 2, FinishReason.LENGTH)
    cluster.end_leg("prefill-0", Leg.PREFILL)
    values = cluster.values()
    assert (
        values["dispatches_retried_total"],
        values["streams_resumed_total"],
        values["dispatches_total"],
    ) == (1, 1, 2)
    (timeline,) = cluster.timelines
    assert [dispatch.failure for dispatch in timeline.dispatches] == [f"{decoder}: killed", None]
    assert [dispatch.num_steps for dispatch in timeline.dispatches] == [2, 1]


def test_steps_are_timed_by_pool_and_phase_against_predictions(cluster: Watched) -> None:
    cluster.step("prefill-0", timing(prefill=100, squares=10_000, seconds=0.03))
    cluster.step("decode-0", timing(sequences=4, context=400, seconds=0.01))
    cluster.step("decode-0", timing(prefill=10, squares=100, sequences=4, context=404, seconds=0.02))
    values = cluster.values()
    assert values['step_duration_seconds_sum{phase="prefill",pool="prefill"}'] == pytest.approx(0.03)
    assert values['step_duration_seconds_sum{phase="decode",pool="decode"}'] == pytest.approx(0.01)
    assert values['step_duration_seconds_sum{phase="mixed",pool="decode"}'] == pytest.approx(0.02)
    assert {values[f'prediction_ratio_count{{of="{phase}_step"}}'] for phase in ("prefill", "decode")} == {
        2,
        1,
    }


def test_arithmetic_and_traffic_are_counted_from_the_shapes_of_steps(cluster: Watched) -> None:
    cluster.step("decode-0", timing(sequences=4, context=400))
    cluster.step("prefill-0", timing(prefill=50, squares=2500))
    cluster.step("decode-0", timing(prefill=50, squares=2500, sequences=4, context=400))
    values = cluster.values()
    decode, prefill, mixed = (f'{{phase="{phase}",pool="{pool}"}}' for pool, phase in STEPS)
    assert values[f"estimated_flops_total{decode}"] == 4 * 100 + 400 * 1 + 4 * 10
    assert values[f"estimated_read_bytes_total{decode}"] == 1000 + 400 * 8
    assert values[f"estimated_write_bytes_total{decode}"] == 4 * 8
    assert values[f"estimated_flops_total{prefill}"] == 50 * 100 + 2500
    assert values[f"estimated_read_bytes_total{prefill}"] == 1000
    assert values[f"estimated_write_bytes_total{prefill}"] == 50 * 8
    assert values[f"estimated_flops_total{mixed}"] == 54 * 100 + 2900 + 4 * 10
    assert values[f"step_duration_seconds_count{mixed}"] == 1, "what MFU divides by has the same labels"


def test_preemptions_are_counted_from_a_workers_first_report(cluster: Watched) -> None:
    for count in (3, 3, 5, 6):
        cluster.step("decode-0", num_preemptions=count)
    assert cluster.values()['num_preemptions_total{pool="decode"}'] == 3


def test_each_ranks_processor_time_is_shown(cluster: Watched) -> None:
    report = StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad(), rank_cpu_s=(3.0, 2.5))
    cluster.handle(report)
    cluster.step("decode-0")  # whose report has none
    values = cluster.values()
    assert values['rank_cpu_seconds{pool="decode",rank="0",worker="decode-0"}'] == 3.0
    assert values['rank_cpu_seconds{pool="decode",rank="1",worker="decode-0"}'] == 2.5


def test_gauges_show_the_present_state_of_each_worker(cluster: Watched) -> None:
    cluster.step("decode-0", num_running=3, num_waiting=2, num_free_blocks=64)
    values = cluster.values()
    where = '{pool="decode",worker="decode-0"}'
    assert (values[f"num_requests_running{where}"], values[f"num_requests_waiting{where}"]) == (3, 2)
    assert values[f"kv_cache_usage_perc{where}"] == pytest.approx(1 - 64 / 256)
    assert values['workers_ready{pool="decode"}'] == values['workers_configured{pool="decode"}'] == 1
    assert values[f"worker_restarts{where}"] == 2
    cluster.lose("decode-0")
    assert f"num_requests_running{where}" not in cluster.values()


def test_a_worker_that_changes_its_role_counts_for_its_new_pool(cluster: Watched) -> None:
    cluster.handle(WorkerRole("prefill-0", Role.DECODE))
    cluster.step("prefill-0", timing(sequences=1, context=10))
    assert cluster.values()['step_duration_seconds_count{phase="decode",pool="decode"}'] == 1


def test_a_request_that_nobody_can_carry_out_is_not_judged(cluster: Watched) -> None:
    cluster.submit(make_request())
    cluster.leg_ended("decode-0", Leg.DECODE, "no text fits it", kind=FailureKind.INVALID)
    cluster.leg_ended("prefill-0", Leg.PREFILL, "aborted")
    values = cluster.values()
    assert values['request_success_total{finished_reason="invalid"}'] == 1
    assert not [name for name in values if name.startswith("slo_requests")]


def test_an_adopted_request_is_counted_but_its_times_are_not() -> None:
    cluster = Watched("decode-0")
    ended = Timeline(
        request_id="r",
        submitted_s=5.0,
        first_token_s=5.0,
        ended_s=6.0,
        dispatches=(),
        finish_reasons=(FinishReason.LENGTH,),
        num_output_tokens=(9,),
        is_adopted=True,
    )
    cluster.tally.closed(ended)
    values = cluster.values()
    assert values['request_success_total{finished_reason="length"}'] == 1
    assert not [name for name in values if name.startswith(("time_to_first", "e2e", "slo_requests"))]
