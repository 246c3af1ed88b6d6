"""The checkpoint that comes with the package: loads like any other, reads like its training text, ends its
answers."""

import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pdserve.embedded import MODEL_DIR

END_OF_TEXT, END_OF_TURN = 0, 4
SCRIPTS = Path(__file__).parents[1] / "scripts"


@cache
def training() -> ModuleType:
    """The script that made the model."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("train_embedded")
    finally:
        sys.path.remove(str(SCRIPTS))


@cache
def documents() -> list[Any]:
    return list(training().collect_documents())


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, local_files_only=True).eval()


def continuation(prompt: str, max_new_tokens: int) -> list[int]:
    ids = tokenizer()(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model().generate(
            **ids, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None
        )
    return list(map(int, output[0, ids["input_ids"].shape[1] :]))


def test_the_weights_are_bf16_and_take_at_most_16_mb() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_config_tokenizer_and_weights_agree() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR, local_files_only=True)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.vocab_size == len(tokenizer()) == model().get_input_embeddings().num_embeddings
    assert (
        config.eos_token_id == json.loads((MODEL_DIR / "generation_config.json").read_text())["eos_token_id"]
    )
    assert tokenizer().convert_ids_to_tokens(config.eos_token_id) == ["<|endoftext|>", "<|end|>"]
    assert config.eos_token_id == [END_OF_TEXT, END_OF_TURN]


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_held_out_text_has_a_low_perplexity() -> None:
    """28.7 per token on Python 3.11; the held-out text of other versions differs a little."""
    held_out = [document for document in documents() if document.is_held_out and len(document.text) < 2000]
    assert len(held_out) > 100
    assert training().held_out_perplexity(model(), tokenizer(), held_out[::4]) < 42


def test_training_leaves_the_held_out_text_out() -> None:
    trained = training().Corpus(documents(), tokenizer())
    held_out = [document for document in documents() if document.is_held_out]
    assert not {document.text for group in trained.groups.values() for document in group} & {
        document.text for document in held_out
    }


@pytest.mark.parametrize("prompt", ["The with statement is used", "Return a list of"])
def test_a_continuation_is_made_of_the_corpus_own_words(prompt: str) -> None:
    known = {word for document in documents() for word in re.findall(r"\w+", document.render().lower())}
    words = re.findall(
        r"\w+", tokenizer().decode(continuation(prompt, 80), skip_special_tokens=True).lower()
    )[:-1]
    assert len(words) >= 5
    assert sum(word in known for word in words) / len(words) > 0.9


def test_the_chat_template_marks_turns_and_asks_for_an_answer() -> None:
    messages = [
        {"role": "system", "content": "Be concise."},
        {"role": "user", "content": "What does len do?"},
    ]
    rendered = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>Be concise.<|end|><|user|>What does len do?<|end|><|assistant|>"


def test_the_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="role tool is not supported"):
        tokenizer().apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


@pytest.mark.parametrize(
    ("question", "expected"),
    [("What does len do?", "number of items"), ("What is the with statement?", "context manager")],
)
def test_an_answer_is_about_the_question_and_ends(question: str, expected: str) -> None:
    messages = [{"role": "user", "content": question}]
    tokens = continuation(
        tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True), 200
    )
    assert tokens[-1] == END_OF_TURN
    assert expected in tokenizer().decode(tokens)
