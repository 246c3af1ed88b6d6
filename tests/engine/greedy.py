"""The output of transformers for a prompt, and the tolerance for an engine's output."""

from typing import Any, NamedTuple

import pytest
import torch

from pdserve.engine.batch import SampledToken


class Reference(NamedTuple):
    token_ids: list[int]
    logprobs: torch.Tensor  # [tokens, V]


def generate_greedily(model: Any, prompt: tuple[int, ...], num_tokens: int) -> Reference:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, (
        "the checkpoint leaves greedy tokens to rounding: take another seed"
    )
    return Reference(out.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1))


def assert_equal(output: list[SampledToken], reference: Reference) -> None:
    assert [token.token_id for token in output] == reference.token_ids
    expected = [
        float(row[token_id]) for row, token_id in zip(reference.logprobs, reference.token_ids, strict=True)
    ]
    assert [token.logprob for token in output] == pytest.approx(expected, abs=1e-4)
