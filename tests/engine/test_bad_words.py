"""Token sequences that an output may not contain, against vLLM's processor written down again."""

import torch
from hypothesis import given, settings, strategies as st

from pdserve.engine.bad_words import BadWords
from pdserve.engine.sampler import Sampler
from pdserve.kernels.reference import TorchKernels
from tests.engine.chunks import follow, make_chunk, random_logits

TOKENS = st.integers(0, 3)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=6)


def forbidden_by_vllm(words: list[list[int]], output: list[int]) -> set[int]:
    """As vllm/v1/sample/ops/bad_words.py: _apply_bad_words_single_batch."""
    found = set()
    for word in words:
        if len(word) > len(output) + 1:
            continue
        length = len(word) - 1
        before = output[-length:] if length > 0 else []
        if before == word[:length]:
            found.add(word[-1])
    return found


@given(words=WORDS, prompt=st.lists(TOKENS, min_size=1, max_size=3), output=st.lists(TOKENS, max_size=6))
def test_the_same_tokens_are_forbidden_as_in_vllm(
    words: list[list[int]], prompt: list[int], output: list[int]
) -> None:
    found = BadWords(words).forbidden(prompt + output, len(prompt))
    assert set(found) == forbidden_by_vllm(words, output)


def drawn(chunk_of: list[int], temperature: float, seed: int, words: tuple[tuple[int, ...], ...]) -> int:
    chunk = make_chunk(output=tuple(chunk_of), temperature=temperature, seed=seed, bad_words=words)
    ((token,),) = Sampler(TorchKernels()).sample(random_logits(seed), [chunk])
    return token.token_id


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0]))
def test_the_word_never_comes_and_other_tokens_do(seed: int, temperature: float) -> None:
    wanted = drawn([], temperature, seed, ())
    assert drawn([], temperature, seed, ((wanted,),)) != wanted
    assert drawn([9], temperature, seed, ((8, wanted),)) == drawn([9], temperature, seed, ())
    assert drawn([8], temperature, seed, ((8, drawn([8], temperature, seed, ())),)) != drawn(
        [8], temperature, seed, ()
    )


def test_what_a_grammar_demands_comes_all_the_same() -> None:
    logits = torch.zeros(2, 50)
    bound = follow(make_chunk(temperature=0.0, grammar="g", bad_words=((3,),)), 3)
    freer = follow(make_chunk(temperature=0.0, grammar="g", bad_words=((3,),)), 3, 7)
    (first,), (second,) = Sampler(TorchKernels()).sample(logits, [bound, freer])
    assert (first.token_id, second.token_id) == (3, 7)
