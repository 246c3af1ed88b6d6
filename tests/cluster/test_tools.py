"""Tools with real workers: even a model with random weights makes calls that fit the schema, streamed and
whole."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from ..checkpoints import small_checkpoint
from ..gateway.tools.models import eos_of, qwen
from .harness import Cluster, Clusters

pytestmark = pytest.mark.cluster
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "Aix"]},
        "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "stop"}},
]
CHAT: dict[str, Any] = {
    "model": "llama-wide",
    "messages": [{"role": "user", "content": "the weather?"}],
    "tools": TOOLS,
    "max_tokens": 400,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, clusters: Clusters) -> Cluster:
    """A random model with Qwen's markers and template."""
    path = small_checkpoint(tmp_path_factory.mktemp("tools"), "llama-wide")
    qwen().pretrained.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_of(qwen())}))
    return clusters.get(path)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://{cluster._launched.http_address}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
    cluster.check_all_blocks_free()


def check(name: str, arguments: str) -> None:
    schemas = {"get_weather": PARAMETERS, "stop": {"maxProperties": 0}}
    jsonschema.validate(json.loads(arguments), schemas[name])


def test_required_calls_fit_their_schemas(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **CHAT, tool_choice="required", parallel_tool_calls=False, n=4, seed=1
    )
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        check(call.function.name, call.function.arguments)


def test_the_chosen_function_is_called_and_streamed_incrementally(client: openai.OpenAI) -> None:
    chosen: Any = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        **CHAT, tool_choice=chosen, parallel_tool_calls=False, seed=2
    ) as stream:
        parts = [
            event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"
        ]
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls or []
    assert len(parts) > 1
    assert "".join(parts) == call.function.arguments
    check(call.function.name, call.function.arguments)


def test_a_model_may_call_or_end(client: openai.OpenAI) -> None:
    marker = qwen().added_tokens["<tool_call>"]
    likes = {"tool_calls": marker, "stop": eos_of(qwen())}
    for reason, token_id in likes.items():
        answer = client.chat.completions.create(
            **CHAT, parallel_tool_calls=False, seed=3, logit_bias={str(token_id): 100}
        )
        (choice,) = answer.choices
        assert choice.finish_reason == reason
        assert len(choice.message.tool_calls or ()) == (reason == "tool_calls")
