"""Outputs that follow a grammar equal those of `transformers` with the same grammar, token for token."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdserve.core.request import FinishReason, SamplingParams
from pdserve.grammar.messages import GrammarSetup
from pdserve.grammar.sources import choice_grammar, json_schema_grammar, regex_grammar
from pdserve.grammar.vocabulary import tokenizer_json

from ..checkpoints import reference_model, small_checkpoint
from .joined import JoinedEngines

VOCAB_SIZE, EOS = 384, 256
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99999}, "s": {"type": "string", "maxLength": 6}},
    "required": ["n", "s"],
}
GRAMMARS = [
    json_schema_grammar(json.dumps(SCHEMA)),
    regex_grammar("[a-f]{3,9}(x|y)"),
    choice_grammar(["yes", "no", "maybe"]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens are the bytes, and some that have no text; the end of text is known only to
    tokenizer_config.json."""
    path = small_checkpoint(tmp_path_factory.mktemp("checkpoints"), "llama-gqa")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(EOS): {"content": "<end>", "special": True} | dict.fromkeys(FLAGS, False)
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def reference(path: Path, prompt: list[int], grammar: str, max_tokens: int) -> list[int]:
    """Greedy, the masks computed in place."""
    model = reference_model(path)
    matcher = LLMatcher(LLTokenizer(tokenizer_json(path), n_vocab=VOCAB_SIZE, eos_token=[EOS]), grammar)
    tokens: list[int] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != EOS):
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1].float()
        bits = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[:VOCAB_SIZE]
        tokens.append(int(logits.masked_fill(bits == 0, float("-inf")).argmax()))
        assert matcher.consume_token(tokens[-1])
    return tokens


@pytest.fixture
def joined(checkpoint: Path) -> Iterator[JoinedEngines]:
    joined = JoinedEngines(
        checkpoint, budget=16, set_up=lambda: GrammarSetup(tokenizer_json(checkpoint), VOCAB_SIZE, (EOS,))
    )
    yield joined
    joined.close()


@torch.inference_mode()
def test_constrained_outputs_equal_the_reference(joined: JoinedEngines, checkpoint: Path) -> None:
    prompts = [[(7 * i + k) % 256 for i in range(20 + k)] for k in range(3)]
    specs = [
        joined.submit(prompt, SamplingParams(max_tokens=60, temperature=0.0, grammar=grammar), eos=(EOS,))
        for prompt in prompts
        for grammar in (*GRAMMARS, "")
    ]
    joined.run()
    for number, spec in enumerate(specs):
        outputs = joined.outputs_of(spec)
        grammar = spec.sampling.grammar
        if grammar:
            expected = reference(checkpoint, prompts[number // 4], grammar, 60)
            assert [output.token_id for output in outputs] == expected
            assert outputs[-1].finish_reason is (
                FinishReason.STOP if expected[-1] == EOS else FinishReason.LENGTH
            )


@torch.inference_mode()
def test_an_output_resumed_by_another_worker_continues_unchanged(joined: JoinedEngines) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=7, grammar=GRAMMARS[0])
    whole = joined.submit(range(30), sampling, eos=(EOS,))
    joined.run()
    tokens = [output.token_id for output in joined.outputs_of(whole)]
    resumed = joined.submit(range(30), sampling, output=tokens[:7], eos=(EOS,))
    joined.run()
    assert [output.token_id for output in joined.outputs_of(resumed)] == tokens[7:]
