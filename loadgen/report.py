"""Computes figures from records. Throughputs count requests that ended well, over the time from the first
request sent to the last ended; latencies are those of requests that ended well. Where several rounds are
summed up, their times are added."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .records import GeneratorLoad, Legs, RequestRecord, Round
from .slo import Slo
from .statistics import Distribution

LEGS = ("queue", "worker_queue", "prefill", "way", "transfer", "exposed_transfer", "first_decode")
# the generator is part of what was measured when it is later than this share of the median TTFT, and than a
# timer's grain
_LATENESS_SHARE, _LATENESS_GRAIN_S = 0.05, 0.002


@dataclass(frozen=True)
class PromptBucket:
    """TTFT of prompts of `low` to `high` - 1 tokens; both are powers of two."""

    low: int
    high: int
    ttft_ms: Distribution


@dataclass(frozen=True)
class GeneratorReport:
    """Whether the figures are the server's or the generator's own."""

    cpu_share: float  # share of one core
    lateness_ms: Distribution | None  # sent after due; None in a closed loop
    loop_lag_ms: Distribution | None  # observations may be late by this much
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All figures of one target."""

    num_requests: int
    num_ok: int
    errors: dict[str, int]
    duration_s: float
    num_input_tokens: int
    num_cached_tokens: int | None
    num_output_tokens: int
    requests_per_s: float
    requests_per_min: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    tokens_per_s_per_user: Distribution | None
    slo: dict[str, float | None]
    goodput_per_s: float
    good_share: float  # share of all requests, failed ones included
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    ttft_by_prompt_tokens: tuple[PromptBucket, ...]
    legs_ms: dict[str, Distribution]
    generator: GeneratorReport

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON."""
        return asdict(self)


def make_report(rounds: Sequence[Round], slo: Slo) -> Report:
    records = [record for one in rounds for record in one.records]
    ok = [record for record in records if record.answer is not None]
    duration_s = sum(one.duration_s for one in rounds)
    num_input = sum(record.answer.num_prompt_tokens for record in ok if record.answer is not None)
    cached = _present(record.answer.num_cached_tokens for record in ok if record.answer is not None)
    num_output = sum(record.num_output_tokens for record in ok)
    num_good = sum(slo.is_met(record) for record in ok)
    tpot_s = _present(record.tpot_s for record in ok)
    ttft_ms = _ms(_present(record.ttft_s for record in ok))
    return Report(
        num_requests=len(records),
        num_ok=len(ok),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        duration_s=duration_s,
        num_input_tokens=num_input,
        num_cached_tokens=int(sum(cached)) if cached else None,
        num_output_tokens=num_output,
        requests_per_s=_rate(len(ok), duration_s),
        requests_per_min=_rate(len(ok), duration_s) * 60,
        input_tokens_per_s=_rate(num_input, duration_s),
        output_tokens_per_s=_rate(num_output, duration_s),
        tokens_per_s_per_user=Distribution.of([1 / gap_s for gap_s in tpot_s if gap_s > 0]),
        slo=asdict(slo),
        goodput_per_s=_rate(num_good, duration_s),
        good_share=_rate(num_good, len(records)),
        ttft_ms=ttft_ms,
        itl_ms=_ms([gap_s for record in ok for gap_s in record.itl_s]),
        tpot_ms=_ms(tpot_s),
        e2e_ms=_ms(_present(record.e2e_s for record in ok)),
        ttft_by_prompt_tokens=_ttft_by_prompt_tokens(ok),
        legs_ms=_legs_ms(ok),
        generator=_generator_report(
            records, GeneratorLoad.together([one.generator for one in rounds]), ttft_ms
        ),
    )


def _rate(amount: float, over: float) -> float:
    return amount / over if over > 0 else 0.0


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ms(values_s: Sequence[float]) -> Distribution | None:
    summary = Distribution.of(values_s)
    return None if summary is None else summary.scaled(1e3)


def _ttft_by_prompt_tokens(records: Sequence[RequestRecord]) -> tuple[PromptBucket, ...]:
    buckets: dict[int, list[float]] = {}
    for record in records:
        if record.ttft_s is not None:
            buckets.setdefault(record.num_prompt_tokens.bit_length(), []).append(record.ttft_s)
    summaries = ((bits, _ms(values)) for bits, values in sorted(buckets.items()))
    return tuple(
        PromptBucket(1 << bits >> 1, 1 << bits, summary) for bits, summary in summaries if summary is not None
    )


def _legs_ms(records: Sequence[RequestRecord]) -> dict[str, Distribution]:
    """Legs that some request had, in the order of a request's journey."""

    def of_server(leg: Callable[[Legs], float | None]) -> list[float]:
        return _present(
            leg(r.answer.legs) for r in records if r.answer is not None and r.answer.legs is not None
        )

    values = {
        "queue": of_server(lambda legs: legs.queue_s),
        "worker_queue": of_server(lambda legs: legs.worker_queue_s),
        "prefill": of_server(lambda legs: legs.prefill_s),
        "way": _present(record.way_s for record in records),
        "transfer": of_server(lambda legs: legs.transfer_s),
        "exposed_transfer": of_server(lambda legs: legs.exposed_s),
        "first_decode": _present(record.first_decode_s for record in records),
    }
    summaries = {name: _ms(values[name]) for name in LEGS}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def _generator_report(
    records: Sequence[RequestRecord], load: GeneratorLoad, ttft_ms: Distribution | None
) -> GeneratorReport:
    lateness_ms, lag_ms = _ms(_present(record.lateness_s for record in records)), _ms(load.loop_lags_s)
    cpu_share = _rate(load.cpu_s, load.wall_s)
    median_ttft_ms = ttft_ms.p50 if ttft_ms is not None else 0.0
    limit_ms = max(_LATENESS_SHARE * median_ttft_ms, _LATENESS_GRAIN_S * 1e3)
    warnings = []
    if lateness_ms is not None and lateness_ms.p95 > limit_ms:
        warnings.append(
            f"5 % of requests were sent {lateness_ms.p95:.1f} ms late or more: the load was not what was"
            " asked for"
        )
    if lag_ms is not None and lag_ms.p95 > limit_ms:
        warnings.append(
            f"the generator's loop was {lag_ms.p95:.1f} ms late in 5 % of cases: latencies contain that"
        )
    if cpu_share > 0.8:
        warnings.append(
            f"the generator kept its core busy for {cpu_share:.0%} of the time: it may be what was measured"
        )
    return GeneratorReport(cpu_share, lateness_ms, lag_ms, tuple(warnings))
