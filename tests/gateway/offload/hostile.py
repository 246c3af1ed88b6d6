"""Requests built to stall a server: each is small to send, within 16 MiB, and expensive to examine."""

import json
from collections.abc import Callable
from typing import Any

from pdserve.proto import pdserve_pb2 as pb

CONTEXT = 131_072
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
)
USER = {"role": "user", "content": "hello"}


def _joined(before: str, item: str, count: int, after: str) -> bytes:
    return (before + ",".join([item] * count) + after).encode()


def _tools(count: int, size: int) -> list[Any]:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(size)}}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]


def _deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


HTTP: dict[str, Callable[[], tuple[str, bytes]]] = {
    "one letter": lambda: (COMPLETIONS, json.dumps({"prompt": "a" * 16_000_000}).encode()),
    "one letter, fewer": lambda: (COMPLETIONS, json.dumps({"prompt": "a" * 1_000_000}).encode()),
    "special tokens": lambda: (
        COMPLETIONS,
        json.dumps({"prompt": "<|im_start|>" * 120_000, "max_tokens": 1}).encode(),
    ),
    "blanks": lambda: (TOKENIZE, json.dumps({"prompt": " " * 1_500_000}).encode()),
    "other scripts": lambda: (
        TOKENIZE,
        json.dumps({"prompt": "你好" * 300_000}, ensure_ascii=False).encode(),
    ),
    "escapes": lambda: (COMPLETIONS, json.dumps({"prompt": "\x00" * 2_000_000}).encode()),
    "many tokens": lambda: (
        TOKENIZE,
        json.dumps({"prompt": "a " * 125_000, "return_token_strs": True}).encode(),
    ),
    "many texts": lambda: (COMPLETIONS, json.dumps({"prompt": ["a" * 4000] * 64, "max_tokens": 1}).encode()),
    "too many texts": lambda: (COMPLETIONS, _joined('{"prompt":[', '"a"', 800_000, "]}")),
    "ids": lambda: (COMPLETIONS, json.dumps({"prompt": [[300] * 130_000] * 4, "max_tokens": 1}).encode()),
    "ids, few bytes": lambda: (COMPLETIONS, json.dumps({"prompt": [7] * 21_000, "max_tokens": 1}).encode()),
    "ids, echoed": lambda: (
        COMPLETIONS,
        json.dumps({"prompt": [70] * 130_000, "max_tokens": 1, "echo": True}).encode(),
    ),
    "log probabilities of a prompt": lambda: (
        COMPLETIONS,
        json.dumps({"prompt": [70] * 130_000, "max_tokens": 1, "echo": True, "logprobs": 0}).encode(),
    ),
    "log probabilities, streamed": lambda: (
        COMPLETIONS,
        json.dumps(
            {"prompt": [70] * 6_000, "max_tokens": 1, "echo": True, "logprobs": 20, "stream": True}
        ).encode(),
    ),
    "too many ids": lambda: (COMPLETIONS, _joined('{"prompt":[', "7", 2_000_000, "]}")),
    "ids beyond the vocabulary": lambda: (
        COMPLETIONS,
        json.dumps({"prompt": [7] * 130_000 + [10**6]}).encode(),
    ),
    "empty lists": lambda: (COMPLETIONS, _joined('{"prompt":[', "[]", 1_200_000, "]}")),
    "empty lists, fewer": lambda: (COMPLETIONS, _joined('{"prompt":[', "[]", 20_000, "]}")),
    "deep lists": lambda: (COMPLETIONS, b'{"prompt":' + b"[" * 8_000_000),
    "deep objects": lambda: (CHAT, b'{"messages":' + b'{"a":' * 800_000),
    "unknown fields": lambda: (
        COMPLETIONS,
        ("{" + ",".join(f'"{i:x}":1' for i in range(250_000)) + "}").encode(),
    ),
    "metadata": lambda: (
        COMPLETIONS,
        ('{"prompt":"a","metadata":{' + ",".join(f'"{i:x}":"1"' for i in range(250_000)) + "}}").encode(),
    ),
    "metadata, fewer": lambda: (
        COMPLETIONS,
        ('{"prompt":"a","metadata":{' + ",".join(f'"{i:x}":"1"' for i in range(5_000)) + "}}").encode(),
    ),
    "biases": lambda: (
        COMPLETIONS,
        ('{"prompt":"a","logit_bias":{' + ",".join(f'"{i}":1' for i in range(250_000)) + "}}").encode(),
    ),
    "biases, as many as may be": lambda: (
        COMPLETIONS,
        json.dumps({"prompt": "a", "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(400)}}).encode(),
    ),
    "stop strings": lambda: (COMPLETIONS, _joined('{"prompt":"a","stop":[', '"a"', 200_000, "]}")),
    "long stop string": lambda: (COMPLETIONS, json.dumps({"prompt": "a", "stop": "a" * 8_000_000}).encode()),
    "stop ids": lambda: (COMPLETIONS, _joined('{"prompt":"a","stop_token_ids":[', "7", 1_500_000, "]}")),
    "choices": lambda: (
        COMPLETIONS,
        _joined('{"prompt":"a","structured_outputs":{"choice":[', '"a"', 200_000, "]}}"),
    ),
    "schema": lambda: (
        COMPLETIONS,
        (
            '{"prompt":"a","structured_outputs":{"json":'
            + _joined('{"enum":[', '"a"', 200_000, "]}").decode()
            + "}}"
        ).encode(),
    ),
    "messages": lambda: (CHAT, _joined('{"messages":[', json.dumps(USER), 100_000, "]}")),
    "messages, as many as may be": lambda: (
        CHAT,
        _joined('{"max_tokens":1,"messages":[', json.dumps(USER), 9_000, "]}"),
    ),
    "messages, few bytes": lambda: (
        CHAT,
        _joined('{"max_tokens":1,"messages":[', '{"role":"u"}', 4_900, "]}"),
    ),
    "calls": lambda: (
        CHAT,
        _joined(
            '{"messages":[{"role":"a","tool_calls":[',
            '{"function":{"name":"f","arguments":""}}',
            9_000,
            "]}]}",
        ),
    ),
    "long message": lambda: (
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": "a " * 1_000_000}]}).encode(),
    ),
    "parts of a message": lambda: (
        CHAT,
        _joined('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', 200_000, "]}]}"),
    ),
    "detokenize": lambda: (DETOKENIZE, json.dumps({"tokens": [70] * 131_000}).encode()),
    "detokenize too many": lambda: (DETOKENIZE, _joined('{"tokens":[', "7", 1_500_000, "]}")),
    "no JSON": lambda: (COMPLETIONS, b'"' * 8_000_000),
    "backslashes": lambda: (COMPLETIONS, b'{"prompt":"' + b"\\" * 8_000_001),
}


TOOLS: dict[str, Callable[[], tuple[str, bytes]]] = {
    "as many as may be": lambda: (CHAT, json.dumps({"messages": [USER], "tools": _tools(128, 40)}).encode()),
    "too many": lambda: (CHAT, json.dumps({"messages": [USER], "tools": _tools(20_000, 3)}).encode()),
    "one deep": lambda: (
        CHAT,
        (
            '{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f","parameters":'
            + _deep(190)
            + "}}]}"
        ).encode(),
    ),
    "large schemas": lambda: (
        CHAT,
        json.dumps({"max_tokens": 1, "messages": [USER], "tools": _tools(8, 1000)}).encode(),
    ),
    "small schemas": lambda: (
        CHAT,
        json.dumps({"max_tokens": 1, "messages": [USER], "tools": _tools(100, 9)}).encode(),
    ),
    "too large schemas": lambda: (CHAT, json.dumps({"messages": [USER], "tools": _tools(8, 2000)}).encode()),
    "calls": lambda: (
        CHAT,
        _joined(
            '{"max_tokens":1,"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[',
            '{"function":{"name":"f","arguments":"{\\"a\\":[1,2,3]}"}}',
            9_000,
            "]}]}",
        ),
    ),
}


def _field(number: int, data: bytes) -> bytes:
    """Returns a field of bytes in wire format."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _chat(messages: bytes) -> bytes:
    return _field(2, _field(2, messages))


def _bias(token_id: int) -> bytes:
    return _field(16, b"\x08" + _varint(token_id))


def _request(**fields: Any) -> bytes:
    return pb.GenerateRequest(**fields).SerializeToString()


GRPC: dict[str, Callable[[], tuple[str, bytes]]] = {
    "text": lambda: ("Generate", _request(prompt=pb.Prompt(text="a" * 16_000_000))),
    "text to tokenize": lambda: (
        "Tokenize",
        pb.TokenizeRequest(prompt=pb.Prompt(text="a " * 125_000)).SerializeToString(),
    ),
    "ids": lambda: (
        "Generate",
        _request(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[300] * 131_000)),
            sampling=pb.SamplingParams(max_tokens=1),
        ),
    ),
    "log probabilities": lambda: (
        "Generate",
        _request(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[70] * 6_000)),
            sampling=pb.SamplingParams(max_tokens=1, prompt_logprobs=20),
        ),
    ),
    "too many ids": lambda: (
        "Generate",
        _request(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[7] * 4_000_000))),
    ),
    "ids one by one": lambda: ("Generate", _field(2, _field(3, b"\x08\x07" * 2_000_000))),
    "unknown fields": lambda: ("Generate", b"\xf8\x07\x01" * 5_000_000),
    "unknown fields, fewer": lambda: ("Generate", b"\xf8\x07\x01" * 20_000),
    "fields again and again": lambda: ("Generate", b"\x0a\x01a" * 5_000_000),
    "empty messages": lambda: ("Generate", _chat(b"\x0a\x00" * 2_000_000)),
    "empty messages, fewer": lambda: ("Generate", _chat(b"\x0a\x00" * 9_000)),
    "empty calls": lambda: ("Generate", _chat(_field(1, b"\xa2\x01\x00" * 9_000) * 120)),
    "empty calls, fewer": lambda: ("Generate", _chat(_field(1, b"\xa2\x01\x00" * 5_000) * 4)),
    "biases": lambda: ("Generate", _field(3, b"".join(map(_bias, range(20_000, 250_000))))),
    "stop strings": lambda: ("Generate", _field(3, _field(12, b"a") * 1_200_000)),
    "resumptions": lambda: (
        "Generate",
        _request(prompt=pb.Prompt(text="a"), request_id="r", resume_from=[0] * 9_000),
    ),
    "choices": lambda: ("Generate", _field(3, _field(18, _field(5, _field(1, b"a") * 1_000_000)))),
    "detokenize": lambda: ("Detokenize", pb.DetokenizeRequest(token_ids=[70] * 131_000).SerializeToString()),
    "detokenize too many": lambda: (
        "Detokenize",
        pb.DetokenizeRequest(token_ids=[70] * 1_500_000).SerializeToString(),
    ),
}
