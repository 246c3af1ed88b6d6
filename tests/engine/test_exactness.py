"""The engine's greedy tokens and logprobs against transformers' `generate`, for every feature of the model
definition."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from pdserve.engine.engine import Engine, EngineOptions
from tests.checkpoints import VARIANTS, reference_model, small_checkpoint
from tests.engine.driver import make_sequence, random_prompt, run_to_end
from tests.engine.greedy import Reference, assert_equal, generate_greedily

NUM_TOKENS = 8
LENGTHS = (1, 17, 48, 130)
LONG = (
    "llama-gqa",
    "llama-yarn-rope",
    "llama3-rope",
    "mistral-sliding-100-mha",
    "qwen2-sliding-upper-layers",
    "qwen3",
)


class Subject(NamedTuple):
    """One checkpoint: our engine, and the output of transformers for a prompt."""

    engine: Engine
    generate: Callable[[tuple[int, ...], int], Reference]

    def prompt(self, length: int, seed: int = 0) -> tuple[int, ...]:
        return tuple(random_prompt(self.engine.config.vocab_size, length, length + 10_000 * seed))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    directory = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(name: str) -> Subject:
        path = small_checkpoint(directory, name)
        model = reference_model(path)
        engine = Engine.open(path, EngineOptions(dtype="float32", num_blocks=700))

        @cache
        def generate(prompt: tuple[int, ...], num_tokens: int) -> Reference:
            return generate_greedily(model, prompt, num_tokens)

        return Subject(engine, generate)

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_transformers_alone_batched_and_chunked(
    name: str, subject: Callable[[str], Subject]
) -> None:
    checked = subject(name)
    engine = checked.engine
    num_free_blocks = engine.pool.num_free_blocks
    prompts = [checked.prompt(length) for length in LENGTHS]
    references = [checked.generate(prompt, NUM_TOKENS) for prompt in prompts]
    alone = [
        run_to_end(engine, [make_sequence(engine, p, max_tokens=NUM_TOKENS)], use_cache=False)[0]
        for p in prompts
    ]
    batched = run_to_end(
        engine,
        [make_sequence(engine, p, max_tokens=NUM_TOKENS, cache_salt="new") for p in prompts],
        max_chunk=13,
    )
    sequences = [make_sequence(engine, p, max_tokens=NUM_TOKENS) for p in prompts]
    cached = run_to_end(engine, sequences)
    assert [seq.num_cached_tokens for seq in sequences] == [0, 16, 32, 128]
    for outputs in (alone, batched, cached):
        for output, reference in zip(outputs, references, strict=True):
            assert_equal(output, reference)
    assert engine.pool.num_free_blocks == num_free_blocks


@pytest.mark.parametrize("max_chunk", [4096, 700])
@pytest.mark.parametrize("name", LONG)
def test_long_prompts_equal_transformers(
    name: str, max_chunk: int, subject: Callable[[str], Subject]
) -> None:
    checked = subject(name)
    engine, prompt = checked.engine, checked.prompt(2000)
    output = run_to_end(
        engine, [make_sequence(engine, prompt, max_tokens=4)], max_chunk=max_chunk, use_cache=False
    )[0]
    assert_equal(output, checked.generate(prompt, 4))


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding-16", "qwen3-sliding-mixed"])
def test_a_sequence_recomputed_with_its_output_continues_exactly(
    name: str, subject: Callable[[str], Subject]
) -> None:
    checked = subject(name)
    engine, prompt = checked.engine, checked.prompt(50)
    reference = checked.generate(prompt, NUM_TOKENS)
    seq = make_sequence(engine, prompt, max_tokens=NUM_TOKENS)
    for token_id in reference.token_ids[:5]:
        seq.append(token_id)
    assert_equal(
        run_to_end(engine, [seq], max_chunk=20)[0], Reference(reference.token_ids[5:], reference.logprobs[5:])
    )


def test_prompts_that_share_a_prefix_share_blocks_and_stay_exact(subject: Callable[[str], Subject]) -> None:
    checked = subject("llama-gqa")
    engine, prefix = checked.engine, checked.prompt(70, seed=1)
    prompts = [prefix + checked.prompt(length, seed=2) for length in (1, 5, 30)]
    run_to_end(engine, [make_sequence(engine, prefix, max_tokens=1)])
    sequences = [make_sequence(engine, prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
    outputs = run_to_end(engine, sequences)
    assert [seq.num_cached_tokens for seq in sequences] == [64, 64, 64]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert_equal(output, checked.generate(prompt, NUM_TOKENS))


@pytest.mark.parametrize("length", [1, 16, 29])
def test_choices_forked_from_one_prompt_equal_those_computed_alone(
    length: int, subject: Callable[[str], Subject]
) -> None:
    checked = subject("llama-gqa")
    engine, prompt = checked.engine, checked.prompt(length, seed=3)
    sampling: dict[str, Any] = {"temperature": 1.3, "seed": 5, "max_tokens": 20, "logprobs": None, "n": 4}
    together = run_to_end(engine, [make_sequence(engine, prompt, **sampling)], use_cache=False)[0]
    alone = [
        run_to_end(engine, [make_sequence(engine, prompt, choices=(choice,), **sampling)], use_cache=False)[0]
        for choice in range(4)
    ]
    assert together == [token for output in alone for token in output]
    assert len({tuple(output) for output in alone}) == 4


def test_a_choice_resumed_by_another_worker_continues_with_the_same_tokens(
    subject: Callable[[str], Subject],
) -> None:
    checked = subject("qwen3")
    engine, prompt = checked.engine, checked.prompt(21)
    sampling: dict[str, Any] = {
        "temperature": 1.1,
        "seed": 8,
        "max_tokens": 24,
        "logprobs": None,
        "frequency_penalty": 0.4,
    }
    whole = run_to_end(engine, [make_sequence(engine, prompt, choices=(2,), **sampling)])[0]
    for done in (1, 11, 23):
        resumed = make_sequence(
            engine,
            prompt,
            choices=(2,),
            output=[token.token_id for token in whole[:done]],
            cache_salt="new",
            **sampling,
        )
        assert run_to_end(engine, [resumed])[0] == whole[done:]


def test_seeded_tokens_are_the_same_alone_and_in_any_batch(
    subject: Callable[[str], Subject],
) -> None:
    engine = (checked := subject("qwen2")).engine
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 2**64 - 1},
        {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.2, "seed": 3},
        {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 4},
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5, "logit_bias": ((1, 3.0), (2, 4.5), (3, -100.0))},
    ]

    def sequences() -> list[Any]:
        return [
            make_sequence(engine, checked.prompt(20 + 7 * index), max_tokens=30, logprobs=None, **sampling)
            for index, sampling in enumerate(options)
        ]

    alone = [run_to_end(engine, [seq], use_cache=False)[0] for seq in sequences()]
    assert run_to_end(engine, sequences(), max_chunk=9) == alone
    assert run_to_end(engine, sequences()[::-1]) == alone[::-1]


def test_generation_stops_at_any_of_several_eos_tokens(subject: Callable[[str], Subject]) -> None:
    checked = subject("llama-several-eos")
    engine = checked.engine
    assert engine.config.eos_token_ids == (7, 11, 42)
    logits = torch.zeros(3)
    for seed in range(40):
        sampling: dict[str, Any] = {"temperature": 3.0, "seed": seed, "max_tokens": 400}
        free, stopped = (
            run_to_end(engine, [make_sequence(engine, checked.prompt(5), ignore_eos=ignore, **sampling)])[0]
            for ignore in (True, False)
        )
        ends = [index for index, token in enumerate(free) if token.token_id in (7, 11, 42)]
        assert stopped == free[: ends[0] + 1 if ends else len(free)]
        logits += torch.tensor([float(stopped[-1].token_id == eos) for eos in (7, 11, 42)])
        if bool((logits > 0).all()):
            return
    pytest.fail("no seed ended in each of the three EOS tokens")
