"""Rates are computed from arrival times alone, the same way for every engine."""

import pytest

from bench.comparison.peers.protocol import RunTimes, make_prompts, tokens_per_s
from bench.comparison.peers.schema import CASES, Case, CellResult, best_variants, pool_repeats

PREFILL = Case("p", "prefill", batch_size=2, num_prompt_tokens=100, num_new_tokens=1)
DECODE = Case("d", "decode", batch_size=2, num_prompt_tokens=4, num_new_tokens=3)


def result(variant: str, *rates: float) -> CellResult:
    return CellResult("e", variant, "shape", "bfloat16", 2, "case", rates)


def test_prefill_is_prompt_tokens_over_the_time_to_the_last_first_token() -> None:
    assert tokens_per_s(PREFILL, RunTimes(10.0, ((10.5,), (12.0,)))) == pytest.approx(100.0)


def test_decode_counts_only_while_the_whole_batch_decodes() -> None:
    """From 2.0 (the last first token) to 4.0 (the first last token): four tokens arrive."""
    assert tokens_per_s(DECODE, RunTimes(0.0, ((1.0, 3.0, 4.0), (2.0, 2.5, 4.0)))) == pytest.approx(4 / 2)


def test_missing_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected 2 sequences of 3 tokens"):
        tokens_per_s(DECODE, RunTimes(0.0, ((1.0, 2.0), (1.0, 2.0, 3.0))))


def test_every_engine_gets_the_same_prompts() -> None:
    for case in CASES:
        prompts = make_prompts(case, 1000)
        assert prompts == make_prompts(case, 1000)
        assert [len(prompt) for prompt in prompts] == [case.num_prompt_tokens] * case.batch_size


def test_rounds_are_pooled_and_the_faster_variant_counts() -> None:
    pooled = pool_repeats([result("a", 1.0), result("b", 5.0), result("a", 3.0, 9.0)])
    assert [r.repeats_tokens_per_s for r in pooled] == [(1.0, 3.0, 9.0), (5.0,)]
    assert [r.variant for r in best_variants(pooled)] == ["b"]
