"""Judges are compared round by round, on a model that is slower than the embedded one and says the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.comparison.load_generators import table
from bench.comparison.load_tools.slowed import make_slowed
from pdserve.embedded import MODEL_DIR


def test_a_ratio_is_that_of_the_rounds_not_of_the_medians() -> None:
    def one(ours: float, theirs: float) -> dict[str, dict[str, float]]:
        return {
            "ours": {"requests": 8, "TTFT p50": ours, "ITL p50": 1.0},
            "theirs": {"requests": 8, "TTFT p50": theirs},
        }

    lines = list(table([one(10, 11), one(100, 110), one(20, 40)], ["ours", "theirs"]))
    assert lines[0].split() == ["ours", "theirs", "theirs", "/", "ours"]
    assert [line.split() for line in lines[1:]] == [
        ["requests", "8.00", "8.00"],
        ["TTFT", "p50", "20.00", "40.00", "1.100", "(1.100", "to", "2.000)"],
        ["ITL", "p50", "1.00", "-", "-"],
    ]


def test_the_slowed_model_answers_like_the_embedded_one(tmp_path: Path) -> None:
    slowed = AutoModelForCausalLM.from_pretrained(make_slowed(tmp_path / "slowed", num_layers=7))
    embedded = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    token_ids = torch.arange(10, 40)[None]  # [1, num_tokens]
    assert slowed.config.num_hidden_layers == 7
    assert torch.equal(slowed(token_ids).logits, embedded(token_ids).logits)


def test_a_model_is_not_made_faster(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--layers: 2 is not valid"):
        make_slowed(tmp_path / "fast", num_layers=2)
