"""Tokens of a prefill engine and a decode engine joined by a real link equal those of `transformers`, token
for token."""

from pathlib import Path

import msgspec
import pytest
import torch

from pdserve.core.request import FinishReason, SamplingParams

from ..checkpoints import VARIANTS, reference_model, small_checkpoint
from .joined import JoinedEngines

NUM_NEW = 12
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, logprobs=0, ignore_eos=True)
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 150)
LONG = ("llama-gqa", "llama-yarn-rope", "llama3-rope", "mistral-sliding-100-mha", "qwen2", "qwen3")


def random_prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]


def reference(
    path: Path, prompts: list[list[int]], num_new: int = NUM_NEW
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of `generate` and their logprobs."""
    model = reference_model(path)
    results = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        results.append((tokens, [float(logprobs[i, token]) for i, token in enumerate(tokens)]))
    return results


def check(
    joined: JoinedEngines, prompts: list[list[int]], expected: list[tuple[list[int], list[float]]]
) -> None:
    sampling = msgspec.structs.replace(GREEDY, max_tokens=len(expected[0][0]))
    for outputs, (tokens, logprobs) in zip(joined.generate(prompts, sampling), expected, strict=True):
        assert [output.index for output in outputs] == list(range(len(tokens)))
        assert [output.token_id for output in outputs] == tokens
        assert [output.logprob for output in outputs] == pytest.approx(logprobs, abs=1e-4)
        assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", VARIANTS)
def test_joined_engines_equal_transformers(name: str, directory: Path) -> None:
    """Batches of mixed lengths, cold and from the prefix cache, whole and in chunks, equal and unequal block
    sizes."""
    path = small_checkpoint(directory, name)
    prompts = random_prompts(LENGTHS, seed=len(name))
    expected = reference(path, prompts)
    block_sizes = [(16, 16), (16, 32), (32, 8)][sum(name.encode()) % 3]
    joined = JoinedEngines(path, block_sizes=block_sizes, budget=48)
    try:
        check(joined, prompts, expected)
        check(joined, prompts, expected)  # every full block comes from the cache now
        assert max(leg.num_cached_tokens for leg in joined.p_box.ended) >= 128
        assert max(leg.num_cached_tokens for leg in joined.d_box.ended) >= 128
    finally:
        joined.close()


@pytest.fixture(params=["shm", "gloo"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", LONG)
def test_long_prompts_equal_transformers(name: str, transport: str, directory: Path) -> None:
    """2,000 tokens, in chunks over one link and whole over the other."""
    path = small_checkpoint(directory, name)
    prompts = random_prompts((2000, 1033), seed=7)
    joined = JoinedEngines(path, transport=transport, budget=700 if transport == "shm" else 4096)
    try:
        check(joined, prompts, reference(path, prompts))
        assert all(leg.stats is not None and leg.stats.num_chunks > 4 for leg in joined.p_box.ended)
    finally:
        joined.close()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_preemption_changes_no_token(kernels: str, directory: Path) -> None:
    path = small_checkpoint(directory, "llama-gqa")
    prompts = random_prompts((100, 90, 80, 70), seed=3)
    expected = reference(path, prompts, num_new=100)
    joined = JoinedEngines(path, num_tokens=4096, kernels=kernels)
    d = joined.engines[1]
    held = d.pool.allocate(d.pool.num_blocks - 30)  # 23 for the prompts, 47 for all that they become
    assert held is not None
    try:
        streams = joined.generate(prompts, msgspec.structs.replace(GREEDY, max_tokens=100))
        for outputs, (tokens, logprobs) in zip(streams, expected, strict=True):
            assert [output.token_id for output in outputs] == tokens
            assert [output.logprob for output in outputs] == pytest.approx(logprobs, abs=1e-4)
        assert joined.decode.scheduler.num_preemptions > 0
    finally:
        d.pool.free(held)
        joined.close()


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(directory: Path) -> None:
    path = small_checkpoint(directory, "qwen3")
    sampling = SamplingParams(
        max_tokens=10,
        temperature=0.9,
        top_p=0.95,
        top_k=50,
        seed=1234,
        n=3,
        repetition_penalty=1.1,
        ignore_eos=True,
    )
    prompts = random_prompts((5, 40, 77, 120), seed=11)
    joined = JoinedEngines(path)
    try:
        together = joined.generate(prompts, sampling)
        for prompt, outputs in zip(prompts, together, strict=True):
            (alone,) = joined.generate([prompt], sampling)
            assert [(o.choice, o.index, o.token_id) for o in alone] == [
                (o.choice, o.index, o.token_id) for o in outputs
            ]
            assert len({tuple(o.token_id for o in alone if o.choice == choice) for choice in range(3)}) == 3
    finally:
        joined.close()


def test_an_eos_ends_the_stream_where_transformers_ends_it(directory: Path) -> None:
    """Several EOS ids: the stream ends with the first of them that greedy decoding reaches."""
    path = small_checkpoint(directory, "llama-several-eos")
    eos_token_ids = VARIANTS["llama-several-eos"].eos_token_ids
    sampling = SamplingParams(max_tokens=200, temperature=0.0)
    prompts = random_prompts((3, 9, 27, 81), seed=5)
    model = reference_model(path)
    joined = JoinedEngines(path)
    try:
        ended = 0
        for prompt, outputs in zip(prompts, joined.generate(prompts, sampling), strict=True):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=200,
                do_sample=False,
                eos_token_id=list(eos_token_ids),
            )
            assert [output.token_id for output in outputs] == out[0, len(prompt) :].tolist()
            stopped = outputs[-1].token_id in eos_token_ids
            assert outputs[-1].finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            ended += stopped
        assert ended
    finally:
        joined.close()
