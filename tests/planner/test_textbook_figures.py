"""Figures that textbooks and surveys of LLM serving state, as our own objects give them (docs/planning.md)."""

from dataclasses import replace

import pytest

from pdserve.core.config import ClusterConfig
from pdserve.core.messages import Role
from pdserve.engine.gpu import Node
from pdserve.engine.gpu_peaks import gpu_model
from pdserve.loadgen.report import make_report
from pdserve.loadgen.slo import Slo
from pdserve.planner.durations import DecodeSeconds
from pdserve.planner.plan import make_plan
from pdserve.planner.priors import priors
from pdserve.planner.splits import Split
from pdserve.planner.virtual_cluster import Arrival, VirtualCluster

from ..loadgen.support import one_round, record
from .replay_support import DURATIONS, LAYOUT, NO_PREFILL_ON_DECODE, arrivals, cluster, shape, site
from .support import checkpoint

OUTPUTS = (500, 20, 200)
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}


def mean_batch(outputs: tuple[int, ...]) -> float:
    """Tokens per decode step of one instance that decodes at most 3 sequences at a time. A step takes a second,
    and nothing else takes any time."""
    second = DecodeSeconds(1.0, 1e-12, 1e-12)
    durations = replace(
        DURATIONS,
        prefill_step_s=1e-9,
        prefill_token_s=1e-12,
        prefill_square_s=1e-18,
        decode=second,
        decode_large=second,
    )
    instance = replace(shape(Role.DECODE, durations=durations), max_batch_size=3)
    served = VirtualCluster([instance], LAYOUT, NO_PREFILL_ON_DECODE).serve(
        arrivals([(0.0, 4, num_tokens) for num_tokens in outputs])
    )
    num_steps = max(request.token_s[-1] for request in served)
    return sum(num_tokens - 1 for num_tokens in outputs) / num_steps


def kv_gb(num_tokens: int, **changes: int) -> float:
    planned = make_plan(
        ClusterConfig(), checkpoint(**LLAMA_7B | changes), [Node("here", (0, 1), 1 << 40, 1 << 40)]
    )
    return num_tokens * planned.kv_bytes_per_token / 1e9


def test_a_static_batch_of_unequal_outputs_is_half_empty() -> None:
    """(3 * 20 + 2 * 180 + 1 * 300) / 500: it ends with its longest output."""
    assert mean_batch(OUTPUTS) == pytest.approx(1.44, abs=0.01)


def test_continuous_batching_keeps_the_batch_full() -> None:
    many = OUTPUTS * 25
    assert mean_batch(many) == pytest.approx(3.0, rel=0.04)
    assert mean_batch(many) / mean_batch(OUTPUTS) == pytest.approx(2.1, abs=0.1)


def test_the_kv_of_a_7b_model_at_2048_tokens_is_a_gigabyte() -> None:
    assert kv_gb(2048) == pytest.approx(1.07, abs=0.01)
    assert kv_gb(32 * 2048) == pytest.approx(34, abs=0.5)


@pytest.mark.parametrize(("num_kv_heads", "share"), [(1, 1 / 32), (8, 1 / 4)])
def test_shared_kv_heads_divide_the_kv(num_kv_heads: int, share: float) -> None:
    assert kv_gb(2048, num_key_value_heads=num_kv_heads) == pytest.approx(share * kv_gb(2048))


def test_a_hundred_tokens_a_second_read_a_7b_models_weights_at_1400_gb_a_second() -> None:
    """Which are 70 % of a memory of 2 TB/s: decoding one sequence is bound by bandwidth."""
    planned = make_plan(ClusterConfig(), checkpoint(**LLAMA_7B), [Node("here", (0, 1), 1 << 40, 1 << 40)])
    assert 100 * planned.weights_bytes / 1e9 == pytest.approx(1400, rel=0.05)
    assert 100 * planned.weights_bytes / 2e12 == pytest.approx(0.70, abs=0.04)


def test_a_hundred_requests_a_minute_of_which_thirty_are_good_are_a_goodput_of_thirty() -> None:
    good, slow = (0.2, 0.3, 0.4), (0.3, 0.4, 0.5)  # TTFT 200 and 300 ms, TPOT 100 ms
    records = [
        record(i, i * 0.6, [i * 0.6 + at_s for at_s in (good if i % 10 < 3 else slow)]) for i in range(100)
    ]
    last = replace(records[-1], ended_s=60.0)  # the round lasts a minute
    report = make_report([one_round(*records[:-1], last)], Slo(ttft=200.1, tpot=100.1))
    assert report.requests_per_min == pytest.approx(100)
    assert 60 * report.goodput_per_s == pytest.approx(30)


def test_bandwidth_is_used_less_and_arithmetic_more_as_users_grow() -> None:
    """Each step of decoding reads the weights once, for all of its sequences."""
    there = site(1)
    planned = there.plan(Split(0, 1))
    one = priors(there.checkpoint.config, planned, there.rates)
    peaks = gpu_model("h200").peaks
    mbu, mfu = [], []
    for num_users in (1, 8, 64, 256):
        step_s = one.decode_step_s + num_users * (one.decode_sequence_s + 100 * one.decode_context_token_s)
        mbu.append(planned.weights_bytes / step_s / peaks.bytes_per_s)
        mfu.append(2 * planned.num_parameters * num_users / step_s / peaks.flops_per_s)
    assert mbu == sorted(mbu, reverse=True) and mbu[0] > 2 * mbu[-1]
    assert mfu == sorted(mfu) and mfu[-1] > 50 * mfu[0]


@pytest.mark.parametrize("num_tokens", [512, 1024, 2048, 3072])
def test_a_cached_prefix_shortens_the_first_tokens_wait_the_more_the_longer_it_is(num_tokens: int) -> None:
    """A prompt all of which but its last 64 tokens is cached, beside the same one computed anew."""
    prefix = (1,) * (num_tokens - 64)
    asked = [Arrival(10.0 * i, prefix + (2 + i,) * 64, 1) for i in range(2)]
    anew, cached = (one.ttft_s for one in cluster(1, 0).serve(asked))
    assert anew is not None and cached is not None
    assert 1 - cached / anew > {512: 0.6, 1024: 0.75, 2048: 0.85, 3072: 0.9}[num_tokens]
