"""One kernel draws the same tokens as the CPU's sampler, from the same random numbers."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from pdserve.core.request import SamplingParams
from pdserve.engine.distribution import draw
from pdserve.kernels.random_numbers import uniform as host_uniform
from pdserve.kernels.sampling import SamplingBatch, sample as reference_sample
from pdserve.kernels.triton.sampling import sample, uniform

from .support import DEVICE

MULTI_TILE = 9001  # tokens: several tiles and a remainder
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},  # more than fit a tile
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 5.0},  # more than fit a tile
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 5000, "top_p": 0.95, "temperature": 1.5},
    {"top_k": 10**6, "top_p": 0.5},
]


def batch_of(
    sampling: list[SamplingParams], rows: list[int], choices: list[int], indices: list[int]
) -> SamplingBatch:
    return SamplingBatch(
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor([s.temperature for s in sampling], dtype=torch.float64),
        torch.tensor([s.top_k for s in sampling], dtype=torch.int32),
        torch.tensor([s.top_p for s in sampling], dtype=torch.float64),
        torch.tensor([s.min_p for s in sampling], dtype=torch.float64),
        torch.from_numpy(np.array([s.seed for s in sampling], dtype=np.uint64).view(np.int64)),
        torch.tensor(choices, dtype=torch.int32),
        torch.tensor(indices, dtype=torch.int32),
    )


def draws_of(
    logits: torch.Tensor, sampling: SamplingParams, indices: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Draws from one row with the kernel, its reference and the engine."""
    count = len(indices)
    batch = batch_of([sampling] * count, [0] * count, [1] * count, indices)
    kernel = sample(logits[None].to(DEVICE), batch.to(DEVICE)).tolist()
    reference = reference_sample(logits[None], batch).tolist()
    uniforms = [host_uniform(sampling.seed, 1, index) for index in indices]
    greedy = sampling.temperature == 0.0
    engine = [int(logits.argmax())] * count if greedy else draw(logits.numpy(), sampling, uniforms)
    return kernel, reference, engine


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_are_those_of_the_reference_and_of_the_engine(filters: dict) -> None:
    for vocab_size in (1, 100, MULTI_TILE):
        logits = torch.randn(vocab_size) * 4
        kernel, reference, engine = draws_of(logits, SamplingParams(seed=7, **filters), [0, 3])
        assert kernel == reference == engine


def test_tokens_of_equal_logits_are_kept_and_ordered_like_the_engines() -> None:
    few_values = (torch.randn(MULTI_TILE) * 2).round()  # far more tokens at a border than fit behind it
    flat = torch.zeros(MULTI_TILE)
    for logits in (few_values, flat):
        for filters in ({"top_k": 3}, {"top_p": 0.3}, {"top_k": 5000, "top_p": 0.999}, {"min_p": 0.1}):
            kernel, reference, engine = draws_of(logits, SamplingParams(seed=3, **filters), [0, 1])
            assert kernel == reference == engine


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((MULTI_TILE,), -torch.inf)
    logits[[7, MULTI_TILE - 1]] = torch.tensor([1.0, 1.5])
    for filters in ({}, {"top_k": 20}, {"top_p": 0.999999}, {"temperature": 50.0}):
        kernel, _, engine = draws_of(logits, SamplingParams(seed=5, **filters), list(range(4)))
        assert kernel == engine
        assert set(kernel) == {7, MULTI_TILE - 1}


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({5: 9.0, 60: 9.0}, 5),
        ({5: -0.0, 60: 0.0}, 5),
        ({5: torch.inf, 60: torch.inf}, 5),
        ({5: torch.inf, 60: torch.nan, 61: -torch.nan}, 60),
        (dict.fromkeys(range(64), -torch.inf), 0),
    ],
)
def test_greedy_and_overflowed_rows_take_the_first_of_the_largest(special: dict, expected: int) -> None:
    logits = torch.full((64,), -1.0)
    logits[list(special)] = torch.tensor(list(special.values()))
    greedy = batch_of([SamplingParams(temperature=0.0)], [0], [0], [0])
    assert sample(logits[None].to(DEVICE), greedy.to(DEVICE)).tolist() == [expected]
    if not logits.max().isfinite():
        kernel, reference, _ = draws_of(logits, SamplingParams(top_k=3, top_p=0.5), [0])
        assert kernel == reference == [expected]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    sampling = [
        SamplingParams(seed=seed, **filters) for seed, filters in enumerate(FILTERS[:5] + FILTERS[7:8])
    ]
    logits = torch.randn(3, 500).to(DEVICE) * 3
    rows, choices, indices = [2, 0, 1, 1, 0, -1], [0, 1, 0, 2, 3, 0], [9, 8, 7, 6, 5, 4]
    together = sample(logits, batch_of(sampling, rows, choices, indices).to(DEVICE))
    for n, row in enumerate(rows[:5]):
        alone = batch_of([sampling[n]], [0], [choices[n]], [indices[n]])
        assert sample(logits[row : row + 1], alone.to(DEVICE)).tolist() == [together[n]]


@triton.jit
def _store_uniforms(seeds, choices, indices, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    numbers = (tl.load(seeds + lanes), tl.load(choices + lanes), tl.load(indices + lanes))
    tl.store(
        out + lanes, uniform(numbers[0].to(tl.uint64), numbers[1].to(tl.uint64), numbers[2].to(tl.uint64))
    )


def test_random_numbers_are_the_hosts_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(2**64, size=64, dtype=np.uint64)
    seeds[:3] = (0, 2**63, 2**64 - 1)
    choices, indices = rng.integers(64, size=64), rng.integers(2**31, size=64)
    wanted = [host_uniform(int(s), int(c), int(i)) for s, c, i in zip(seeds, choices, indices, strict=True)]
    out = torch.empty(64, dtype=torch.float64, device=DEVICE)
    given = (torch.from_numpy(array).to(DEVICE) for array in (seeds.view(np.int64), choices, indices))
    _store_uniforms[(1,)](*given, out, BLOCK=64)
    assert out.tolist() == wanted


def test_parameters_and_logits_of_another_type_are_refused() -> None:
    good = batch_of([SamplingParams()], [0], [0], [0])
    with pytest.raises(ValueError, match="top_p:"):
        SamplingBatch(**(vars(good) | {"top_p": good.top_p.float()}))
    with pytest.raises(ValueError, match="seed:"):
        SamplingBatch(**(vars(good) | {"seed": torch.zeros(2, dtype=torch.int64)}))
    with pytest.raises(ValueError, match="logits:"):
        sample(torch.zeros(1, 8, dtype=torch.bfloat16, device=DEVICE), good.to(DEVICE))
