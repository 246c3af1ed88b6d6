"""Requests that gRPC cannot express and HTTP refuses, by the name of the field."""

from typing import Any

import httpx
import pytest

from tests.gateway.both_apis import over_http
from tests.gateway.support import ScriptedCluster

NAN = float("nan")
ONLY_HTTP: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"prompt": "a", "temprature": 1}, "temprature: 1 is not valid, expected only fields"),
    "unknown field of a message": (
        {"messages": [{"role": "user", "images": []}]},
        "messages[0].images: [] is not valid",
    ),
    "wrong type": (
        {"prompt": "a", "temperature": "hot"},
        "temperature: 'hot' is not valid, expected a valid number",
    ),
    "truth for a number": ({"prompt": "a", "n": True}, "n: True is not valid, expected a valid integer"),
    "no prompt": ({"n": 1}, "prompt: missing, expected a value"),
    "mixed prompts": ({"prompt": ["a", 1]}, "prompt: ['a', 1] is not valid, expected a text, token ids"),
    "many prompts": (
        {"prompt": ["a"] * 65},
        "prompt: '65 prompts' is not valid, expected at most 64 prompts",
    ),
    "negative token": ({"prompt": [5, -1]}, "prompt[1]: -1 is not valid"),
    "huge number": (
        {"prompt": "a", "max_tokens": 2**40},
        f"max_tokens: {2**40} is not valid, expected an integer of 32 bits",
    ),
    "huge seed": ({"prompt": "a", "seed": 2**64}, f"seed: {2**64} is not valid"),
    "stream options without a stream": (
        {"prompt": "a", "stream_options": {}},
        "stream_options: {} is not valid, expected nothing without stream",
    ),
    "alternatives without logprobs": (
        {"messages": [{"role": "user"}], "top_logprobs": 1},
        "top_logprobs: 1 is not valid",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content: ",
    ),
    "best of many": ({"prompt": "a", "best_of": 3}, "best_of: 3 is not valid"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix: 'b' is not valid"),
    "a hot temperature": (
        {"prompt": "a", "temperature": 2.5},
        "temperature: 2.5 is not valid, expected 0 to 2",
    ),
    "an infinite temperature": (
        {"prompt": "a", "temperature": float("inf")},
        "temperature: inf is not valid, expected 0 to 2",
    ),
    "a temperature that is no number": (
        {"prompt": "a", "temperature": NAN},
        "temperature: nan is not valid, expected 0 to 2",
    ),
    "an unknown role": (
        {"messages": [{"role": "narrator", "content": "a"}]},
        "messages[0].role: 'narrator' is not valid, expected 'developer', 'system'",
    ),
    "null from a user": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content: missing, expected a text",
    ),
    "a priority": (
        {"prompt": "a", "priority": 1001},
        "priority: 1001 is not valid, expected -1000 to 1000",
    ),
    "special tokens in the text": (
        {"prompt": "a", "skip_special_tokens": False},
        "skip_special_tokens: False is not valid, expected true",
    ),
    "beams": ({"prompt": "a", "use_beam_search": True}, "use_beam_search: True is not valid, expected false"),
    "an echo of a chat": (
        {"messages": [{"role": "user", "content": "a"}], "echo": True},
        "echo: True is not valid, expected false",
    ),
    "sound": (
        {"messages": [{"role": "user", "content": "a"}], "modalities": ["text", "audio"]},
        "modalities[1]: 'audio' is not valid, expected 'text'",
    ),
    "two guides": (
        {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]},
        "guided_choice: ['b'] is not valid, expected nothing beside guided_regex",
    ),
    "a guide that is none": (
        {"prompt": "a", "guided_json": [1]},
        "guided_json: [1] is not valid, expected a JSON schema",
    ),
    "bias of a text": (
        {"prompt": "a", "logit_bias": {"the": 1.0}},
        "logit_bias: 'the' is not valid, expected token ids",
    ),
    "two constraints": (
        {"prompt": "a", "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs: {'regex': 'a'} is not valid, expected nothing beside response_format",
    ),
    "two kinds": (
        {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs: ['choice', 'regex'] is not valid, expected one of json_object",
    ),
    "no schema": (
        {"prompt": "a", "response_format": {"type": "json_schema"}},
        "response_format.json_schema: missing, expected a schema",
    ),
    "a schema for nothing": (
        {"prompt": "a", "response_format": {"type": "text", "json_schema": {"name": "s", "schema": {}}}},
        "response_format.json_schema: 's' is not valid, expected none",
    ),
    "unknown format": (
        {"prompt": "a", "response_format": {"type": "xml"}},
        "response_format.type: 'xml' is not valid",
    ),
}


@pytest.mark.parametrize("name", ONLY_HTTP)
async def test_http_refuses_what_it_does_not_know(
    http: httpx.AsyncClient, cluster: ScriptedCluster, name: str
) -> None:
    body, message = ONLY_HTTP[name]
    response = await over_http(http, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert response.json()["error"]["param"] == message.partition(":")[0]
    assert cluster.requests == []
