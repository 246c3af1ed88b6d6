"""Tokenizers that fail on a text, or could stall on one."""

import json
from typing import Any

import msgspec
import pytest
from tokenizers import Regex, Tokenizer as Backend, decoders, pre_tokenizers

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest
from pdserve.gateway.intake import Intake
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.text.tokenizer_loading.main import exported
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import (
    Unchecked,
    byte_level,
    metaspace,
    metaspace_with_bytes,
    model_info,
    sentencepiece_like,
    word_piece,
)
from tests.gateway.tokenizer_parts import Json, byte_level_parts, replace, sequence


def test_a_text_that_the_tokenizer_fails_on_is_an_invalid_request() -> None:
    data = exported(byte_level().pretrained)
    backend = Backend.from_str(data.backend_json)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(b+)+$"), "isolated")
    tokenizer = Tokenizer(msgspec.structs.replace(data, backend_json=backend.to_str()))
    assert tokenizer.encode("abc")
    with pytest.raises(InvalidRequest, match="expected a text that the model's tokenizer can take"):
        tokenizer.encode("b" * 64 + "!")


def test_tokens_that_the_tokenizer_fails_on_are_an_invalid_request() -> None:
    data = exported(byte_level().pretrained)
    backend = Backend.from_str(data.backend_json)
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(Regex("(b+)+$"), "")]
    )
    tokenizer = Tokenizer(msgspec.structs.replace(data, backend_json=backend.to_str()))
    (token_id,) = tokenizer.encode("b", add_special_tokens=False)
    other = tokenizer.encode("!", add_special_tokens=False)
    assert tokenizer.decode(other) == "!"
    with pytest.raises(InvalidRequest, match="expected tokens that the model's tokenizer can decode"):
        tokenizer.decode([token_id] * 64 + list(other))


def changed(**changes: Any) -> Tokenizer:
    """A byte-level tokenizer whose JSON has `changes`."""
    data = exported(byte_level().pretrained)
    return Tokenizer(
        msgspec.structs.replace(data, backend_json=json.dumps(json.loads(data.backend_json) | changes))
    )


def split(**pattern: str) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "kind", [byte_level, sentencepiece_like, metaspace, metaspace_with_bytes, word_piece]
)
def test_usual_tokenizers_do_not_stall(kind: Any) -> None:
    assert not kind().may_stall


@pytest.mark.parametrize("expression", [LLAMA_3, QWEN_2, TEKKEN], ids=["Llama 3", "Qwen 2", "Tekken"])
def test_the_expressions_of_public_checkpoints_do_not_stall(expression: str) -> None:
    steps = sequence("pretokenizers", split(Regex=expression), byte_level_parts())
    assert not changed(pre_tokenizer=steps, normalizer={"type": "NFC"}).may_stall


UNUSUAL = {
    "an expression": {"pre_tokenizer": split(Regex=LLAMA_3 + "|x")},
    "an expression of a normalizer": {
        "normalizer": sequence("normalizers", {"type": "NFC"}, replace("", Regex="a?"))
    },
    "a long text": {"pre_tokenizer": split(String="a" * 17)},
    "growth": {"normalizer": replace("x" * 17, String="a")},
    "parts": {"normalizer": sequence("normalizers", *[{"type": "Lowercase"}] * 8)},
}


@pytest.mark.parametrize("name", UNUSUAL)
async def test_an_unusual_tokenizer_encodes_the_shortest_text_in_the_intake_process(name: str) -> None:
    class Recording(Offload):
        async def encode(self, text: str, *_: object) -> tuple[int, ...]:
            return (1,)

        async def render(self, *_: object) -> str:
            return "a"

    tokenizer = changed(**UNUSUAL[name])
    info = model_info(byte_level())
    intake = Intake(tokenizer, info, Unchecked(), Recording(tokenizer, info.name, info.max_model_len))
    limits = LimitsSection()
    assert await intake.token_ids(pb.Prompt(text="a"), limits, "client") == (1,)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")])
    assert await intake.token_ids(pb.Prompt(chat=chat), limits, "client") == (1,)
