"""Summaries, goodput, the report and the comparison of two targets, by hand-made records."""

from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pdserve.loadgen.compare import compare, ratio_of_means
from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.records import CompletedRequest, GeneratorLoad, Legs, RequestRecord, TokenChunk
from pdserve.loadgen.report import make_report
from pdserve.loadgen.slo import Slo, parse_slo
from pdserve.loadgen.statistics import Distribution
from pdserve.loadgen.tables import ratio_lines, report_lines
from tests.loadgen.support import one_round, record

times = st.floats(0.001, 10)


def interpolated(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_percentiles_interpolate_between_neighbours(values: list[float]) -> None:
    summary = Distribution.of(values)
    assert summary is not None
    for percent in (50, 90, 95, 99):
        assert getattr(summary, f"p{percent}") == pytest.approx(
            interpolated(values, percent), rel=1e-9, abs=1e-6
        )
        assert getattr(summary, f"p{percent}") == pytest.approx(float(np.percentile(values, percent)))
    assert (summary.count, summary.min, summary.max) == (len(values), min(values), max(values))
    assert summary.mean == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_nothing_has_no_summary() -> None:
    assert Distribution.of([]) is None


def test_latencies_of_one_request() -> None:
    seen = record(sent_s=1.0, at_s=(1.5, 1.6, 1.9))
    assert (seen.ttft_s, seen.e2e_s) == (pytest.approx(0.5), pytest.approx(0.9))
    assert seen.itl_s == pytest.approx((0.1, 0.3))
    assert seen.tpot_s == pytest.approx(0.2)


def test_tpot_counts_tokens_and_itl_counts_chunks() -> None:
    chunks = (TokenChunk(0.1, 1), TokenChunk(0.3, 4))
    seen = RequestRecord(0, None, 0.0, 0.3, 10, chunks, CompletedRequest(10, 5))
    assert seen.tpot_s == pytest.approx(0.05)
    assert seen.itl_s == pytest.approx((0.2,))


def test_one_token_has_neither_tpot_nor_gaps() -> None:
    seen = record(at_s=(0.2,))
    assert (seen.tpot_s, seen.itl_s) == (None, ())
    assert Slo(ttft=300, tpot=1, itl=1, e2e=300).is_met(seen)


@settings(deadline=None)
@given(st.lists(times, min_size=2, max_size=20))
def test_the_mean_gap_is_tpot_for_single_token_chunks(gaps: list[float]) -> None:
    seen = record(at_s=tuple(np.cumsum(gaps)))
    assert sum(seen.itl_s) / len(seen.itl_s) == pytest.approx(seen.tpot_s)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), True),
        (Slo(ttft=500), True),
        (Slo(ttft=499), False),
        (Slo(tpot=201), True),
        (Slo(tpot=199), False),
        (Slo(itl=299), False),
        (Slo(itl=301), True),
        (Slo(e2e=899), False),
        (Slo(ttft=600, tpot=201, itl=301, e2e=901), True),
        (Slo(ttft=600, tpot=201, itl=301, e2e=100), False),
    ],
)
def test_every_threshold_must_hold(slo: Slo, met: bool) -> None:
    assert slo.is_met(record(sent_s=0.0, at_s=(0.5, 0.6, 0.9))) is met


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.booleans()), min_size=1, max_size=30), st.floats(1, 10_000))
def test_goodput_counts_good_requests_over_the_time(
    requests: list[tuple[float, bool]], limit_ms: float
) -> None:
    records = [
        record(index, at_s=(ttft_s,), error="timeout" if fails else None)
        for index, (ttft_s, fails) in enumerate(requests)
    ]
    report = make_report([one_round(*records)], Slo(ttft=limit_ms))
    good = sum(not fails and ttft_s * 1e3 <= limit_ms for ttft_s, fails in requests)
    duration_s = max(ttft_s for ttft_s, _ in requests)
    assert report.goodput_per_s == pytest.approx(good / duration_s)
    assert report.good_share == pytest.approx(good / len(requests))
    assert report.goodput_per_s <= report.requests_per_s + 1e-9


def test_throughput_counts_successful_requests_over_the_whole_run() -> None:
    ok = [
        record(0, 10.0, (11.0, 12.0, 13.0), num_prompt_tokens=100),
        record(1, 11.0, (13.0, 14.0), num_prompt_tokens=50),
    ]
    failed = record(2, 12.0, (13.0,), num_prompt_tokens=7, error="timeout")
    report = make_report([one_round(*ok, failed)], Slo())
    assert (report.num_requests, report.num_ok, report.errors) == (3, 2, {"timeout": 1})
    assert report.duration_s == pytest.approx(4.0)
    assert report.requests_per_s == pytest.approx(0.5)
    assert report.requests_per_min == pytest.approx(30)
    assert report.input_tokens_per_s == pytest.approx(150 / 4)
    assert report.output_tokens_per_s == pytest.approx(5 / 4)
    assert report.ttft_ms is not None
    assert report.ttft_ms.count == 2
    assert report.tokens_per_s_per_user is not None
    assert report.tokens_per_s_per_user.mean == pytest.approx(1.0)


def test_round_times_are_summed_without_pauses() -> None:
    report = make_report([one_round(record(0, 0.0, (1.0,))), one_round(record(0, 100.0, (103.0,)))], Slo())
    assert report.duration_s == pytest.approx(4.0)
    assert report.requests_per_s == pytest.approx(0.5)


def test_a_load_of_which_nothing_ended_well_has_a_report() -> None:
    report = make_report([one_round(record(at_s=(), error="unreachable"))], Slo(ttft=1))
    assert (report.num_ok, report.ttft_ms, report.goodput_per_s) == (0, None, 0.0)
    assert "1 x unreachable" in "\n".join(report_lines("it", report))


def test_prompts_are_grouped_by_powers_of_two() -> None:
    records = [
        record(index, at_s=(0.1 * (index + 1),), num_prompt_tokens=n)
        for index, n in enumerate((1, 127, 128, 255, 256))
    ]
    buckets = make_report([one_round(*records)], Slo()).ttft_by_prompt_tokens
    assert [(bucket.low, bucket.high, bucket.ttft_ms.count) for bucket in buckets] == [
        (1, 2, 1), (64, 128, 1), (128, 256, 2), (256, 512, 1),
    ]  # fmt: skip


def test_the_legs_of_ttft_sum_up_to_it() -> None:
    legs = Legs(
        queue_s=0.1, worker_queue_s=0.05, prefill_s=0.2, first_token_s=0.38, transfer_s=0.15, exposed_s=0.03
    )
    report = make_report([one_round(record(at_s=(0.4, 0.5), legs=legs))], Slo())
    means = {name: summary.mean for name, summary in report.legs_ms.items()}
    assert means["queue"] + means["worker_queue"] + means["prefill"] + means["way"] == pytest.approx(400)
    assert (means["exposed_transfer"], means["first_decode"]) == (pytest.approx(30), pytest.approx(70))


def test_a_generator_that_is_late_says_so() -> None:
    late = [record(index, sent_s=0.5, due_s=0.4, at_s=(0.6,)) for index in range(20)]
    (warning,) = make_report([one_round(*late)], Slo()).generator.warnings
    assert "sent 100.0 ms late" in warning
    on_time = [record(index, sent_s=0.5, due_s=0.4999, at_s=(0.6,)) for index in range(20)]
    assert make_report([one_round(*on_time)], Slo()).generator.warnings == ()


def test_a_generator_that_is_busy_or_slow_to_see_says_so() -> None:
    busy = GeneratorLoad(cpu_s=9.0, wall_s=10.0, loop_lags_s=(0.05,) * 20)
    warnings = make_report([one_round(record(), generator=busy)], Slo()).generator.warnings
    assert ["loop was" in warnings[0], "core busy" in warnings[1]] == [True, True]


@given(st.lists(times, min_size=2, max_size=12), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_a_constant_ratio_is_found_exactly_however_the_rounds_differ(
    values: list[float], factor: float
) -> None:
    ratio = ratio_of_means("x", values, [value * factor for value in values])
    assert (ratio.ratio, ratio.low, ratio.high) == (pytest.approx(factor),) * 3


def test_the_interval_holds_the_truth_mostly() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        first = rng.normal(100, 10, 12)
        ratio = ratio_of_means("x", list(first), list(first * rng.normal(1.2, 0.1, 12)), seed)
        assert ratio.low is not None and ratio.high is not None
        hits += ratio.low <= 1.2 <= ratio.high
    assert hits >= 80


def test_one_round_gives_a_ratio_without_interval_and_zero_none() -> None:
    ratio = ratio_of_means("x", [2.0], [3.0])
    assert (ratio.ratio, ratio.low, ratio.high) == (1.5, None, None)
    assert ratio_of_means("x", [0.0, 0.0], [3.0, 1.0]).ratio is None


def test_a_comparison_has_the_figures_common_to_both_targets() -> None:
    def rounds(ttft_s: float, at_s: tuple[float, ...] = ()) -> list[Any]:
        return [one_round(record(at_s=(ttft_s, *at_s))), one_round(record(at_s=(ttft_s, *at_s)))]

    ratios = {ratio.figure: ratio for ratio in compare(rounds(0.1, (0.2,)), rounds(0.3), Slo(ttft=200))}
    assert ratios["ttft_ms.p50"].ratio == pytest.approx(3.0)
    assert "itl_ms.p50" not in ratios
    assert ratios["goodput_per_s"].second == 0.0
    lines = list(ratio_lines("a", "b", list(ratios.values())))
    assert len(lines) == len(ratios) + 1
    assert "3.000 to 3.000" in next(line for line in lines if line.startswith("TTFT p50"))


def test_thresholds_are_written_by_name() -> None:
    assert parse_slo("ttft=200, itl=50") == Slo(ttft=200, itl=50)
    for wrong in ("200", "ttft", "ttft=x", "ttft=-1", "speed=3", "ttft=nan", ""):
        with pytest.raises(LoadError, match="slo"):
            parse_slo(wrong)
