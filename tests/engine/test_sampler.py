"""The sampler: the effect of each parameter, and that draws follow the distribution and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.core.request import SamplingParams
from pdserve.engine.batch import SampledToken, ScheduledChunk
from pdserve.engine.distribution import draw
from pdserve.engine.sampler import Sampler
from pdserve.kernels.random_numbers import uniform
from pdserve.kernels.reference import TorchKernels
from tests.engine.chunks import VOCAB_SIZE, follow, make_chunk, random_logits

GRID = [(i + 0.5) / 4000 for i in range(4000)]


def sample(logits: torch.Tensor, *chunks: ScheduledChunk) -> list[list[SampledToken]]:
    return Sampler(TorchKernels()).sample(logits.clone().view(len(chunks), -1), list(chunks))


def support(logits: torch.Tensor, **sampling: Any) -> set[int]:
    """Returns all tokens that a fine grid of uniform numbers reaches."""
    return set(draw(logits.view(-1).numpy(), SamplingParams(**sampling), GRID))


def test_uniform_numbers_are_uniform_and_differ_in_each_argument() -> None:
    numbers = np.array(
        [uniform(seed, choice, index) for seed in range(20) for choice in range(5) for index in range(200)]
    )
    assert len(set(numbers)) == len(numbers)
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert float(((counts - 400) ** 2 / 400).sum()) < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    assert abs(float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])) < 0.03
    assert 0 <= uniform(2**64 - 1, 15, 100_000) < 1


def test_greedy_takes_the_first_of_the_largest_logits() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 9]] = 1.0
    assert sample(logits, make_chunk(temperature=0.0)) == [[SampledToken(7)]]
    assert sample(logits, make_chunk(temperature=0.0, logprobs=0))[0][0].token_id == 7


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 8},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(sampling: dict[str, Any]) -> None:
    logits = random_logits(1)
    params = {"temperature": 1.0} | sampling
    probs = torch.softmax(_filtered(logits / params["temperature"], params), -1)[0].numpy()
    draws = [
        sample(logits, make_chunk(output=(1,) * index, seed=seed, **params))[0][0].token_id
        for seed in range(100)
        for index in range(20)
    ]
    counts = np.bincount(draws, minlength=VOCAB_SIZE)
    assert counts[probs == 0].sum() == 0
    likely = probs * len(draws) >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probs[likely], max(probs[~likely].sum(), 1e-12)) * len(draws)
    degrees = len(observed) - 1
    assert float(((observed - expected) ** 2 / expected).sum()) < degrees + 4 * (2 * degrees) ** 0.5


def _filtered(logits: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """Applies transformers' warpers, in its order."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if "top_k" in params:
        logits = TopKLogitsWarper(params["top_k"])(ids, logits)
    if "top_p" in params:
        logits = TopPLogitsWarper(params["top_p"])(ids, logits)
    if "min_p" in params:
        logits = MinPLogitsWarper(params["min_p"])(ids, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.05, 0.999),
    min_p=st.floats(0.001, 0.9),
    use=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_same_tokens_are_kept_as_in_transformers(
    seed: int, top_k: int, top_p: float, min_p: float, use: tuple[bool, bool, bool]
) -> None:
    values = {"top_k": min(top_k, VOCAB_SIZE), "top_p": top_p, "min_p": min_p}
    params = {name: value for (name, value), used in zip(values.items(), use, strict=True) if used}
    logits = random_logits(seed) / 1.5
    kept = _filtered(logits, params)[0]
    reachable = set((torch.softmax(kept, -1) > 1 / len(GRID)).nonzero().flatten().tolist())
    drawn = support(logits, temperature=1.0, **params)
    assert reachable <= drawn <= set(kept.isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
def test_top_p_keeps_the_fewest_tokens_of_a_large_vocabulary(scale: float) -> None:
    logits = scale * torch.randn(12_000, generator=torch.Generator().manual_seed(3))
    probs = torch.softmax(logits.double(), -1)
    ordered = probs.sort(descending=True).values
    fewest = int((ordered.cumsum(0) < 0.9).sum()) + 1
    uniforms = [(i + 0.5) / 36_000 for i in range(36_000)]
    drawn = set(draw(logits.numpy(), SamplingParams(top_p=0.9), uniforms))
    assert len(drawn) <= fewest + 1  # + 1: the border is decided in float32
    assert min(probs[list(drawn)]) >= ordered[fewest] * 0.999
    assert float(probs[list(drawn)].sum()) > 0.85


def test_equal_logits_are_cut_at_the_border_by_token_id() -> None:
    assert support(torch.zeros(VOCAB_SIZE), top_p=0.5) == set(range(25))
    # none is below the third largest
    assert support(torch.zeros(VOCAB_SIZE), top_k=3) == set(range(VOCAB_SIZE))


def test_a_masked_token_is_never_drawn_whatever_the_number() -> None:
    logits = torch.full((2_000,), -torch.inf)
    logits[[0, 700, 1500]] = 0.0
    assert draw(logits.numpy(), SamplingParams(), [0.0, 0.4, 1 - 2.0**-53]) == [0, 700, 1500]


@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
def test_a_row_that_overflowed_does_not_stop_the_others(overflow: float) -> None:
    logits = random_logits(12, num_rows=2)
    logits[0, 17] = overflow
    chunks = [make_chunk(top_p=0.9, min_p=0.1, top_k=9, logprobs=2), make_chunk(seed=3, logprobs=2)]
    broken, other = sample(logits, *chunks)
    assert broken[0].token_id == 17
    assert other == sample(logits[1], chunks[1])[0]


def test_a_tiny_temperature_is_greedy_and_a_small_one_nearly_so() -> None:
    logits = random_logits(5)
    best = int(logits.argmax())
    for temperature in (1e-9, 1e-4):
        assert sample(logits, make_chunk(temperature=temperature, seed=3))[0][0].token_id == best


def test_repetition_penalty_counts_prompt_and_output_as_transformers_does() -> None:
    logits = random_logits(6)
    chunk = make_chunk([4, 8, 4], output=(9, 9), temperature=0.0, repetition_penalty=1.7, n=1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[4, 8, 4, 9, 9]]), logits.clone())
    _expect_adjusted(logits, expected, chunk)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = random_logits(7)
    chunk = make_chunk(
        [4, 8], output=(9, 9, 4), temperature=0.0, presence_penalty=0.6, frequency_penalty=0.25
    )
    expected = logits.clone()
    expected[0, 9] -= 0.6 + 2 * 0.25
    expected[0, 4] -= 0.6 + 0.25
    _expect_adjusted(logits, expected, chunk)


def test_a_bias_is_added_to_the_raw_logits_before_penalties() -> None:
    logits = random_logits(13)
    bias = ((0, -3.0), (4, 1.5), (9, 7.25), (VOCAB_SIZE - 1, 100.0))
    chunk = make_chunk(
        [4, 8],
        output=(9,),
        temperature=0.0,
        logit_bias=bias,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logprobs=1,
    )
    biased = logits.clone()
    for token_id, value in bias:
        biased[0, token_id] += value
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[4, 8, 9]]), biased)
    expected[0, 9] -= 0.5
    _expect_adjusted(logits, expected, chunk)
    token = sample(logits, chunk)[0][0]
    assert token.token_id == VOCAB_SIZE - 1
    # of the model's own distribution
    assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[0, -1]), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_and_forbids_tokens(temperature: float) -> None:
    logits = random_logits(14)
    best = int(logits.argmax())
    for seed in range(20):
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        assert sample(logits, make_chunk(logit_bias=((17, 100.0),), **options))[0][0].token_id == 17
        assert sample(logits, make_chunk(logit_bias=((best, -100.0),), **options))[0][0].token_id != best


def test_a_biased_stop_token_is_not_drawn_before_min_tokens() -> None:
    chunk = make_chunk(temperature=0.0, min_tokens=1, logit_bias=((5, 100.0),))
    assert sample(torch.zeros(1, VOCAB_SIZE), chunk)[0][0].token_id != 5


def test_penalties_follow_the_sequence_from_step_to_step() -> None:
    sampler = Sampler(TorchKernels())
    chunk = make_chunk(list(range(1, 40)) * 3, temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, 100)
    drawn = []
    for _ in range(100):
        drawn.append(sampler.sample(logits.clone(), [chunk])[0][0].token_id)
        chunk.sequence.append(drawn[-1])
    assert drawn == list(range(100))  # each token is taken once before any is taken twice


def _expect_adjusted(logits: torch.Tensor, expected: torch.Tensor, chunk: ScheduledChunk) -> None:
    spoiled = logits.clone()
    token = Sampler(TorchKernels()).sample(spoiled, [chunk])[0][0]
    torch.testing.assert_close(spoiled, expected)
    assert token.token_id == int(expected.argmax())


@pytest.mark.parametrize("num_output_tokens", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_is_drawn_before_min_tokens(num_output_tokens: int, temperature: float) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [5, 6]] = 50.0  # EOS and a stop token of the request
    chunk = make_chunk(
        output=(9,) * num_output_tokens,
        temperature=temperature,
        min_tokens=2,
        stop_token_ids=(6, VOCAB_SIZE + 1),
    )
    assert (sample(logits, chunk)[0][0].token_id in (5, 6)) == (num_output_tokens >= 2)


def test_logprobs_are_of_the_raw_distribution_best_first() -> None:
    logits = random_logits(8)
    raw = logits.log_softmax(-1)[0]
    chunk = make_chunk([4, 8], temperature=0.3, top_k=2, repetition_penalty=2.0, logprobs=4)
    token = sample(logits, chunk)[0][0]
    assert token.logprob == pytest.approx(float(raw[token.token_id]), abs=1e-6)
    best = raw.topk(4)
    assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
    assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sample(logits, make_chunk(logprobs=0))[0][0].top_logprobs == ()
    assert sample(logits, make_chunk())[0][0].logprob is None
    assert len(sample(logits, make_chunk(logprobs=20))[0][0].top_logprobs) == 20


def test_choices_of_one_row_are_drawn_independently_and_reproducibly() -> None:
    logits = random_logits(9)
    tokens = [token.token_id for token in sample(logits, make_chunk(seed=4, n=8))[0]]
    assert len(set(tokens)) > 2
    alone = make_chunk(seed=4, n=8)
    for choice in range(8):
        one = ScheduledChunk(alone.sequence, 1, (choice,))
        assert sample(logits, one)[0][0].token_id == tokens[choice]


def test_a_token_is_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(10, num_rows=7, vocab_size=5000)
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "seed": 11, "logprobs": 3},
        {"temperature": 1.2, "seed": 2**63, "n": 3},
        {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.1, "seed": 7},
        {"temperature": 0.0, "logprobs": 2, "frequency_penalty": 0.5},
        {"temperature": 0.8, "seed": 5, "logit_bias": ((3, 2.0), (40, -2.0)), "n": 2},
    ]
    chunks = [make_chunk(output=(3,) * index, **sampling) for index, sampling in enumerate(options)]
    alone = [sample(logits[index], chunk)[0] for index, chunk in enumerate(chunks)]
    assert sample(logits, *chunks) == alone
    order = [4, 2, 0, 5, 6, 1, 3]
    assert sample(logits[order], *(chunks[index] for index in order)) == [alone[index] for index in order]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 1000),
    st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.7, 3.0]),
)
def test_only_tokens_of_the_grammar_are_drawn(seed: int, allowed: set[int], temperature: float) -> None:
    logits = random_logits(seed)
    for params in (
        {},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"logit_bias": ((7, 100.0),)},
        {"logprobs": 2},
    ):
        chunk = make_chunk(seed=seed, temperature=temperature, grammar="g", n=4, **params)
        (tokens,) = sample(logits, follow(chunk, *allowed))
        assert {token.token_id for token in tokens} <= allowed


def test_among_the_tokens_of_the_grammar_the_model_decides() -> None:
    logits = random_logits(3)
    allowed = [4, 9, 20]
    ((token,),) = sample(logits, follow(make_chunk(temperature=0.0, grammar="g"), *allowed))
    assert token.token_id == max(allowed, key=lambda token_id: float(logits[0, token_id]))


def test_other_rows_of_the_batch_are_not_restricted() -> None:
    logits = random_logits(4, num_rows=2)
    greedy = [make_chunk(temperature=0.0), follow(make_chunk(temperature=0.0, grammar="g"), 3)]
    (free,), (bound,) = sample(logits, *greedy)
    assert free.token_id == int(logits[0].argmax()) and bound.token_id == 3


def test_min_tokens_delays_a_permitted_end_but_not_a_forced_one() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5] = 9.0  # the end-of-text token
    chunk = make_chunk(temperature=0.0, grammar="g", min_tokens=3)
    assert sample(logits, follow(chunk, 5, 8))[0][0].token_id == 8
    assert sample(logits, follow(chunk, 5))[0][0].token_id == 5
