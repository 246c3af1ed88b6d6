"""A logit bias through a prefill and a decode engine: tokens equal those of `transformers` with the same bias
on every step."""

from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from pdserve.core.request import SamplingParams

from ..checkpoints import reference_model, small_checkpoint
from .joined import JoinedEngines
from .test_joined_engines import random_prompts

NUM_NEW = 40
VOCAB_SIZE = 384


class Bias(LogitsProcessor):  # type: ignore[misc]
    """The request's bias, as torch computes it."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._bias = torch.zeros(VOCAB_SIZE)
        for token_id, value in bias:
            self._bias[token_id] = value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self._bias


def random_bias(count: int, seed: int) -> tuple[tuple[int, float], ...]:
    """Strong enough to change most tokens, also the first, and to leave the choice to the model."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randperm(VOCAB_SIZE, generator=generator)[:count].sort().values.tolist()
    values = (4 * torch.randn(count, generator=generator)).tolist()
    return tuple(zip(token_ids, values, strict=True))


def reference(path: Path, prompts: list[list[int]], bias: tuple[tuple[int, float], ...]) -> list[list[int]]:
    model = reference_model(path)
    processors = LogitsProcessorList([Bias(bias)] if bias else [])
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            logits_processor=processors,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(out.scores).topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, (
            "greedy tokens are left to rounding: take another seed"
        )
        results.append(out.sequences[0, len(prompt) :].tolist())
    return results


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoints"), "llama-gqa")


@pytest.mark.parametrize("count", [1, 300, VOCAB_SIZE])
def test_biased_tokens_equal_transformers_on_both_workers(count: int, path: Path) -> None:
    prompts = random_prompts((1, 16, 40, 150), seed=6)
    bias = random_bias(count, seed=count)
    expected = reference(path, prompts, bias)
    if count > 1:
        unbiased = reference(path, prompts, ())
        assert any(one[0] != other[0] for one, other in zip(expected, unbiased, strict=True)), (
            "the first tokens are the same"
        )
    joined = JoinedEngines(path, budget=48)
    try:
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logit_bias=bias)
        streams = joined.generate(prompts, sampling)
        assert [[output.token_id for output in outputs] for outputs in streams] == expected
    finally:
        joined.close()


def test_a_biased_stream_goes_on_after_preemption_and_resume(path: Path) -> None:
    prompts = random_prompts((100, 90, 80, 70), seed=3)
    bias = random_bias(200, seed=1)
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logit_bias=bias)
    expected = reference(path, prompts, bias)
    joined = JoinedEngines(path, num_tokens=4096)
    d = joined.engines[1]
    held = d.pool.allocate(d.pool.num_blocks - 26)  # 23 for the prompts, 33 for all that they become
    assert held is not None
    try:
        streams = joined.generate(prompts, sampling)
        assert [[output.token_id for output in outputs] for outputs in streams] == expected
        assert joined.decode.scheduler.num_preemptions > 0
        for done in (1, 17, NUM_NEW - 1):
            streams = joined.generate(prompts[:1], sampling, output=expected[0][:done])
            assert [output.token_id for output in streams[0]] == expected[0][done:]
    finally:
        d.pool.free(held)
        joined.close()


def test_a_biased_draw_depends_on_the_seed_alone(path: Path) -> None:
    prompts = random_prompts((5, 40, 77), seed=11)
    bias = random_bias(100, seed=2)
    sampling = SamplingParams(max_tokens=12, temperature=1.1, seed=7, n=3, ignore_eos=True, logit_bias=bias)
    joined = JoinedEngines(path)
    try:
        together = joined.generate(prompts, sampling)
        for prompt, outputs in zip(prompts, together, strict=True):
            (alone,) = joined.generate([prompt], sampling)
            assert [(o.choice, o.index, o.token_id) for o in alone] == [
                (o.choice, o.index, o.token_id) for o in outputs
            ]
    finally:
        joined.close()
