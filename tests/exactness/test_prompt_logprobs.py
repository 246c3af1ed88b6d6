"""Log probabilities of prompt tokens, through a prefill and a decode engine and on one worker, against
`transformers`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from pdserve.core.messages import TokenLogprobs, TokenOutput
from pdserve.core.request import SamplingParams
from pdserve.engine.batch import Batch, ScheduledChunk

from ..checkpoints import VARIANTS, reference_model, small_checkpoint
from ..engine.driver import make_sequence
from .joined import JoinedEngines
from .test_joined_engines import random_prompts

TOP = 4
SAMPLING = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, prompt_logprobs=TOP)
LENGTHS = (1, 2, 16, 33, 150)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: small_checkpoint(directory, name))


class Reference(NamedTuple):
    """[tokens, V] of one prompt; row i is of token i + 1. `noise` is how far transformers' float32 is from
    its float64."""

    logprobs: torch.Tensor
    noise: torch.Tensor


@torch.no_grad()
def reference(path: Path, prompts: list[list[int]]) -> list[Reference]:
    model, exact = reference_model(path), reference_model(path).double()
    references = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logprobs, precise = (of(ids).logits[0, :-1].double().log_softmax(-1) for of in (model, exact))
        references.append(Reference(logprobs, (logprobs - precise).abs()))
    return references


def check(
    logprobs: tuple[TokenLogprobs, ...], prompt: list[int], expected: Reference, top: int = TOP
) -> None:
    assert len(logprobs) == len(prompt) - 1
    for token, token_id, row, noise in zip(logprobs, prompt[1:], *expected, strict=True):
        ids = [token_id, *(other for other, _ in token.top)]
        errors = torch.tensor([token.logprob, *(value for _, value in token.top)]).double() - row[ids]
        assert bool((errors.abs() <= 1e-4 + noise[ids]).all())
        assert len(set(ids[1:])) == top
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.topk(top).values.tolist(), abs=1e-4 + float(noise.max()))


def check_streams(
    streams: list[list[TokenOutput]], prompts: list[list[int]], expected: list[Reference]
) -> None:
    for outputs, prompt, rows in zip(streams, prompts, expected, strict=True):
        first = next(output for output in outputs if (output.choice, output.index) == (0, 0))
        check(first.prompt_logprobs, prompt, rows)
        assert not any(output.prompt_logprobs for output in outputs if output is not first)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_prompts_logprobs_equal_transformers_whole_and_in_chunks(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Prompts of mixed lengths share steps, and a prefix that is cached on both workers changes nothing."""
    path = checkpoint(name)
    prompts = random_prompts(LENGTHS, seed=len(name))
    expected = reference(path, prompts)
    joined = JoinedEngines(path, budget=48)
    try:
        plain = joined.generate(prompts, msgspec.structs.replace(SAMPLING, prompt_logprobs=None))
        num_before = len(joined.p_box.ended)
        for _ in range(2):
            streams = joined.generate(prompts, SAMPLING)
            check_streams(streams, prompts, expected)
            assert [[output.token_id for output in outputs] for outputs in streams] == [
                [output.token_id for output in outputs] for outputs in plain
            ]
        assert {leg.num_cached_tokens for leg in joined.p_box.ended[num_before:]} == {0}
        # which it does not compute
        assert max(leg.num_cached_tokens for leg in joined.d_box.ended[num_before:]) >= 128
    finally:
        joined.close()


@pytest.mark.parametrize("top", [0, 1, 384])
def test_as_many_alternatives_come_as_are_asked_for(top: int, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama-gqa")
    prompts = random_prompts((40,), seed=1)
    joined = JoinedEngines(path)
    try:
        ((first, *_),) = joined.generate(prompts, msgspec.structs.replace(SAMPLING, prompt_logprobs=top))
        check(first.prompt_logprobs, prompts[0], reference(path, prompts)[0], top)
    finally:
        joined.close()


def test_they_arrive_once_with_choice_0_even_after_a_resume(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("qwen3")
    prompts = random_prompts((40, 9), seed=2)
    expected = reference(path, prompts)
    joined = JoinedEngines(path)
    try:
        sampling = msgspec.structs.replace(SAMPLING, n=3, temperature=1.0, seed=4)
        check_streams(joined.generate(prompts, sampling), prompts, expected)
        alone = joined.generate(prompts, SAMPLING)
        for prompt, outputs in zip(prompts, alone, strict=True):
            (rest,) = joined.generate([prompt], SAMPLING, output=[output.token_id for output in outputs[:2]])
            assert [output.token_id for output in rest] == [output.token_id for output in outputs[2:]]
            assert not any(output.prompt_logprobs for output in rest)
    finally:
        joined.close()


def test_both_workers_report_them_so_that_none_is_lost(checkpoint: Callable[[str], Path]) -> None:
    prompts = random_prompts((30,), seed=5)
    joined = JoinedEngines(checkpoint("llama-gqa"))
    try:
        joined.generate(prompts, SAMPLING)
        (own,) = (output for output in joined.p_box.outputs if output.index == 0)
        (repeated,) = (output for output in joined.d_box.outputs if output.index == 0)
        assert own == repeated and own.prompt_logprobs
    finally:
        joined.close()


def test_a_prompt_restarted_half_way_has_each_logprob_once(
    checkpoint: Callable[[str], Path],
) -> None:
    """This happens after a preemption: its blocks are gone, and the first chunk is repeated."""
    path = checkpoint("llama-gqa")
    (prompt,) = random_prompts((50,), seed=9)
    joined = JoinedEngines(path)
    engine = joined.engines[0]
    try:
        seq = make_sequence(engine, prompt, prompt_logprobs=TOP, max_tokens=3)
        for chunks in ((20, 7), (1, 30, 18, 1)):
            engine.kv.admit(seq, use_cache=False)
            for num_tokens in chunks:
                assert engine.kv.grow(seq, seq.num_computed_tokens + num_tokens)
                done = num_tokens == seq.num_uncomputed_tokens
                (tokens,) = engine.runner.launch(
                    Batch((ScheduledChunk(seq, num_tokens, (0,) if done else ()),))
                ).collect()
                engine.kv.computed(seq, num_tokens)
            engine.kv.reset(seq)
        check(tokens[0].prompt_logprobs, prompt, reference(path, [prompt])[0])
    finally:
        joined.close()


def test_the_largest_number_of_them_fits_into_a_hand_over() -> None:
    from pdserve.core.config import MAX_PROMPT_LOGPROBS
    from pdserve.core.handoff import HandOff
    from pdserve.core.request import TransferId
    from pdserve.kv_transfer.config import MAX_PAYLOAD_BYTES

    for num_top in (0, 20):
        top = tuple((2**31 + rank, -1 / 3) for rank in range(num_top))
        prompt = (TokenLogprobs(-1 / 3, top),) * (MAX_PROMPT_LOGPROBS // (num_top + 1))
        assert (
            len(HandOff((TokenOutput(TransferId("r", 0), 0, 0, 1, prompt_logprobs=prompt),)).encode())
            < MAX_PAYLOAD_BYTES
        )
