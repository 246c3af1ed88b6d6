"""The GPU benchmark's requests of every kind, and KV on its way: what is asked for, and that a difference is
noticed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.gpu import checks, link_checks
from bench.gpu.mixed_requests import answered, mixed_requests, num_differences
from bench.gpu.report import Check
from pdserve.core.messages import TokenOutput
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels.triton.launch import INTERPRETED

from ..checkpoints import small_checkpoint

PROMPTS = [[7], [1, 2, 3, 4, 5], [9] * 9]
NUM_NEW_TOKENS = 4


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    options = EngineOptions(
        dtype="float32", num_blocks=64, max_model_len=64, max_batch_size=16, kernels="torch"
    )
    return Engine.open(small_checkpoint(tmp_path, "llama-gqa"), options)


def answers(engine: Engine) -> list[TokenOutput]:
    specs = mixed_requests(PROMPTS, NUM_NEW_TOKENS, engine.config.vocab_size)
    return answered(engine, specs, max_batch_size=16, max_batch_tokens=32)


def test_every_kind_of_sampling_is_asked_for_and_answered(engine: Engine) -> None:
    specs = {
        spec.transfer: spec for spec in mixed_requests(PROMPTS, NUM_NEW_TOKENS, engine.config.vocab_size)
    }
    outputs = answers(engine)
    assert len(outputs) == NUM_NEW_TOKENS * sum(len(spec.choices) for spec in specs.values())
    asked = [spec.sampling for spec in specs.values()]
    for name in (
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "prompt_logprobs",
    ):
        assert len({getattr(sampling, name) for sampling in asked}) > 1, name
    for output in outputs:
        sampling = specs[output.transfer].sampling
        assert len(output.top_logprobs) == (sampling.logprobs or 0)
        if sampling.grammar:
            assert output.token_id % 3 == output.index % 3
    assert any(output.prompt_logprobs for output in outputs)


def test_differences_between_two_engines_are_counted(engine: Engine) -> None:
    ours = answers(engine)
    assert num_differences(ours, answers(engine), 1e-3) == 0
    theirs = list(ours)
    theirs[0] = msgspec.structs.replace(ours[0], token_id=ours[0].token_id + 1)
    place, logprob = next(
        (place, output.logprob) for place, output in enumerate(ours) if output.logprob is not None
    )
    theirs[place] = msgspec.structs.replace(ours[place], logprob=logprob + 0.01)
    assert num_differences(ours, theirs, 1e-3) == 2
    assert num_differences(ours, theirs[:-1], 1e-3) == float("inf")


@pytest.mark.skipif(not INTERPRETED, reason="toy sizes are for Triton's interpreter")
@pytest.mark.parametrize("wire", ["raw", "int8"])
def test_kv_of_other_tokens_is_noticed(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent from other blocks, under a checksum that is right for them."""
    gather = KVCache.gather

    def gather_elsewhere(cache: KVCache, start: int, end: int, block_ids: Sequence[int], *rest: Any) -> Any:
        return gather(cache, start, end, list(block_ids)[::-1], *rest)

    monkeypatch.setattr(KVCache, "gather", gather_elsewhere)
    case = next(case for case in link_checks.cases(is_toy=True) if f", {wire}," in case.name)
    outcome = checks.checked(case)
    assert isinstance(outcome, Check)
    assert not outcome.problem
    assert not outcome.ok
