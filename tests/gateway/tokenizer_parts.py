"""Parts of tokenizers, as tokenizer.json has them."""

import base64
from typing import Any

import msgspec

from pdserve.gateway.text.tokenizer_loading.growth import (
    Parts,
)

Json = dict[str, Any]


def sequence(name: str, *parts: Json) -> Json:
    return {"type": "Sequence", name: list(parts)}


def replace(content: str, **pattern: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def doubling(times: int) -> Json:
    return sequence("normalizers", *[replace("aa", String="a")] * times)


def template(num_texts: int, num_ids: int) -> Json:
    special = {"x": {"id": "x", "ids": [0] * num_ids, "tokens": ["x"] * num_ids}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * num_texts + [
        {"SpecialToken": {"id": "x", "type_id": 0}}
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def charsmap(*replacements: bytes) -> str:
    """SentencePiece's map without a tree."""
    return base64.b64encode(bytes(4) + b"\0".join(replacements)).decode()


def byte_level_parts(add_prefix_space: bool = False) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def parts(**changes: Any) -> Parts:
    return msgspec.convert({"model": {}} | changes, Parts)
