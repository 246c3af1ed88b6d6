"""The embedded model's tokenizer, as the grammar process takes it."""

import asyncio
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from pdserve.engine.checkpoint import open_checkpoint, resolve_model_path
from pdserve.grammar.messages import GrammarSetup
from pdserve.grammar.vocabulary import tokenizer_json

PATH = resolve_model_path("embedded")


@cache
def setup() -> GrammarSetup:
    config = open_checkpoint(PATH).config
    return GrammarSetup(tokenizer_json(PATH), config.vocab_size, config.eos_token_ids)


@cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(setup().tokenizer, n_vocab=setup().vocab_size, eos_token=list(setup().eos_token_ids))


def tokens(text: str) -> list[int]:
    return tokenizer().tokenize_str(text)


def allowed(bits: bytes) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")).tolist())


class RecordingListener:
    """Keeps the answers that it receives."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[tuple[str, int, Any]] = asyncio.Queue()

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self.answers.put_nowait(("mask", key, (num_tokens, allowed(bits))))

    def on_refused(self, key: int, why: str) -> None:
        self.answers.put_nowait(("refused", key, why))

    def on_failed(self, key: int, why: str) -> None:
        self.answers.put_nowait(("failed", key, why))
