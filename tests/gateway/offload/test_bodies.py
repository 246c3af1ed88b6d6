"""A body or a message is parsed to the same messages, or refused with the same words, in the head and in the
intake process."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings, strategies as st

from pdserve.core.config import ClusterConfig, LimitsSection
from pdserve.core.errors import InvalidRequest
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.http import bodies
from pdserve.gateway.http.answer_options import AnswerOptions
from pdserve.gateway.http.bodies import MESSAGES, read_body
from pdserve.gateway.http.chat_schema import ChatCompletionRequest
from pdserve.gateway.http.schema import CompletionRequest
from pdserve.gateway.offload import offload as head
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.offload.work import read_message
from pdserve.gateway.translate import UnknownModel
from pdserve.proto import pdserve_pb2 as pb
from tests.deadlines import WAIT_S
from tests.gateway.support import ScriptedCluster, byte_level, model_info

LIMITS = LimitsSection(max_tokens=200, max_n=4)
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MANY_MESSAGES = {"messages": [USER] * 10_001}
LONG = "the quick brown fox " * 100

COMPLETIONS: list[Any] = [
    {"prompt": "hello"},
    {
        "prompt": ["hello", "you"],
        "echo": True,
        "logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    {
        "prompt": [1, 2, 3],
        "return_token_ids": True,
        "seed": -1,
        "stop": "a",
        "logit_bias": {"5": 1.5},
        "top_k": -1,
    },
    {"prompt": [[1], [2, 3]], "metadata": {"a": "b"}, "user": "somebody", "max_completion_tokens": 3},
    {"prompt": "a", "structured_outputs": {"regex": "a+"}},
    {
        "prompt": "a",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}},
        },
    },
    {},
    [],
    {"prompt": None},
    {"prompt": [1, "a"]},
    {"prompt": [-1]},
    {"prompt": [2**32]},
    {"prompt": [1] * 256},
    {"prompt": LONG * 3},
    {"prompt": "a", "model": "other"},
    {"prompt": ["a"] * 65},
    {"prompt": "a", "unknown": {"deep": [1]}},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "best_of": 2},
    {"prompt": "a", "n": 2**40},
    {"prompt": "a", "temperature": "hot\n\u202e'\""},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}},
    {"prompt": "a", "stop": ["a"] * 17},
    {"prompt": "a", "stop": ["a", 1]},
    {"prompt": "a", "stop_token_ids": [1] * 1025},
    {"prompt": "a", "user": "a\nb"},
    {"prompt": "a", "cache_salt": "a" * 129},
    {"prompt": "a", "metadata": {str(i): "v" for i in range(17)}},
    {"prompt": "a", "metadata": {"a": "v" * 513}},
    {"prompt": "a", "metadata": {"a" * 65: "v"}},
    {"prompt": "a", "metadata": {"a": [1]}},
    {"prompt": "a", "stream_options": {"include_usage": True}},
]
CHATS: list[Any] = [
    {"messages": [USER], "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"messages": []},
    MANY_MESSAGES,
    {"messages": [{"role": "user", "content": LONG * 3}]},
    {"messages": [USER], "tools": [{"type": "none"}]},
    {"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"messages": [USER], "tool_choice": "other"},
    {"messages": [USER], "top_logprobs": 2},
]
TOKENIZE: list[Any] = [
    {"prompt": "hello", "return_token_strs": True},
    {"messages": [USER]},
    {"prompt": "a", "messages": [USER]},
    {},
    {"prompt": "a", "tools": [TOOL]},
    {"prompt": LONG * 3},
]
DETOKENIZE: list[Any] = [
    {"tokens": [1, 2]},
    {"tokens": [1, -1]},
    {"tokens": ["a"]},
    {"tokens": [1] * 257},
    {"model": "other"},
]
TABLE = [
    *(("completions", body) for body in COMPLETIONS),
    *(("chat", body) for body in CHATS),
    *(("tokenize", body) for body in TOKENIZE),
    *(("detokenize", body) for body in DETOKENIZE),
]
BROKEN = [
    b"",
    b"{",
    b"[" * 5000,
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": 1e999}',
    b"null",
    b'"' * 9,
]
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}

Outcome = tuple[list[bytes], AnswerOptions] | tuple[type[Exception], str, object, object]


def refusal(error: Exception) -> Outcome:
    return type(error), str(error), getattr(error, "field", None), getattr(error, "expected", None)


class Reader:
    """Reads it in both places, on a separate loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.offload = Offload(byte_level(), "tiny", 256)

    def here(self, route: str, data: bytes) -> Outcome:
        try:
            messages, asked = read_body(route, data, "id", self.offload.bounds(LIMITS))
        except (InvalidRequest, UnknownModel) as error:
            return refusal(error)
        return [message.SerializeToString() for message in messages], asked

    def there(self, route: str, data: bytes) -> Outcome:
        """Reads it in the intake process: only the head's threshold for small bodies is reduced."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bodies, "SMALL_BYTES", -1)
            try:
                messages, asked = self.loop.run_until_complete(
                    self.offload.body(route, data, "id", LIMITS, "a")
                )
            except (InvalidRequest, UnknownModel) as error:
                return refusal(error)
        assert all(isinstance(message, MESSAGES[route]) for message in messages)
        return [message.SerializeToString() for message in messages], asked

    def message_here(self, kind: type[Message], data: bytes) -> Outcome:
        try:
            return [
                read_message(kind, data, self.offload.bounds(LIMITS)).SerializeToString()
            ], AnswerOptions()
        except (InvalidRequest, UnknownModel) as error:
            return refusal(error)

    def message(self, kind: type[Message], data: bytes, small_bytes: int) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "SMALL_BYTES", small_bytes)
            try:
                message = self.loop.run_until_complete(self.offload.message(kind, data, LIMITS, "a"))
            except (InvalidRequest, UnknownModel) as error:
                return refusal(error)
        return [message.SerializeToString()], AnswerOptions()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.loop.run_until_complete(reader.offload.stop())
    reader.loop.close()


@pytest.mark.parametrize(("route", "body"), TABLE, ids=[f"{route}-{str(body)[:50]}" for route, body in TABLE])
def test_a_body_is_read_alike_in_both_places(reader: Reader, route: str, body: Any) -> None:
    data = json.dumps(body).encode()
    assert reader.here(route, data) == reader.there(route, data)


@pytest.mark.parametrize("data", BROKEN)
def test_an_invalid_body_is_refused_alike_in_both_places(reader: Reader, data: bytes) -> None:
    outcome = reader.here("completions", data)
    assert outcome == reader.there("completions", data)
    assert outcome[0] is InvalidRequest


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
_FIELDS = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, "json", "other"})


@given(
    route=st.sampled_from(sorted(PATHS)),
    good=st.sampled_from([body for _, body in TABLE[:6]] + CHATS[:2] + TOKENIZE[:2] + DETOKENIZE[:1]),
    changed=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=3),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_read_alike(reader: Reader, route: str, good: Any, changed: dict[str, Any]) -> None:
    data = json.dumps(good | changed).encode()
    assert reader.here(route, data) == reader.there(route, data)


PARSED: list[Message] = [
    pb.GenerateRequest(prompt=pb.Prompt(text="hello")),
    pb.GenerateRequest(model="other"),
    pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * 256))),
    pb.GenerateRequest(sampling=pb.SamplingParams(stop=["a"] * 10_001)),
    pb.GenerateRequest(sampling=pb.SamplingParams(stop=["a"] * 17)),
    pb.GenerateRequest(sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1))),
    pb.TokenizeRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * 511))),
    pb.TokenizeRequest(prompt=pb.Prompt(text=LONG * 3)),
    pb.DetokenizeRequest(token_ids=[1] * 257),
    pb.ApplyRequest(config_yaml="a"),
]
MESSAGES_OF_GRPC: list[tuple[type[Message], bytes]] = [
    *((type(message), message.SerializeToString()) for message in PARSED),
    (pb.GenerateRequest, b"\xff" * 20),
    (pb.GenerateRequest, b"\xf8\x07\x01" * 5),
    (pb.GenerateRequest, b"\x12\x03\xf8\x07\x01"),
]


@pytest.mark.parametrize(("kind", "data"), MESSAGES_OF_GRPC)
def test_a_message_is_read_alike_in_both_places(reader: Reader, kind: type[Message], data: bytes) -> None:
    here = reader.message_here(kind, data)
    assert (
        here == reader.message(kind, data, small_bytes=1 << 20) == reader.message(kind, data, small_bytes=-1)
    )


def test_a_message_comes_back_without_what_its_later_fields_overwrite(reader: Reader) -> None:
    data = b"\x0a\x01a" * 100_000 + b"\x0a\x04tiny"
    assert reader.message(pb.GenerateRequest, data, small_bytes=-1)[0] == [b"\x0a\x04tiny"]


CALLS = b"\xa2\x01\x00"  # an empty tool call, in a message of a conversation


def nested(num_messages: int, num_calls: int) -> bytes:
    message = pb.ChatMessage.FromString(CALLS * num_calls)
    return pb.GenerateRequest(
        prompt=pb.Prompt(chat=pb.Chat(messages=[message] * num_messages))
    ).SerializeToString()


def test_a_message_of_too_many_parts_is_refused_despite_short_lists(reader: Reader) -> None:
    kind, message, *_ = reader.message(pb.GenerateRequest, nested(20, 9_000), small_bytes=-1)
    assert kind is InvalidRequest and "parts" in str(message)


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt":[' + b"[]," * 300_000 + b"[]]}",
        b'{"prompt":"a","stop":[' + b'"a",' * 300_000 + b'"a"]}',
        b'{"prompt":"a","x":[' + b"{}," * 300_000 + b"{}]}",
        b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}}",
        b'{"prompt":"' + b'\\"' * 300_000 + b'","x":[' + b"{}," * 300_000 + b"{}]}",
    ],
)
def test_a_body_of_too_many_values_is_refused_by_their_number(reader: Reader, data: bytes) -> None:
    kind, message, *_ = reader.there("completions", data)
    assert kind is InvalidRequest and f"at most {bodies.MAX_VALUES} texts, lists and objects" in str(message)


@pytest.mark.parametrize("text", [',"[]{}' * 100_000, '\\"' * 100_000, "a" * 700_000])
def test_the_content_of_a_string_is_not_counted(text: str) -> None:
    bodies._check_values(json.dumps({"prompt": text}).encode())


def test_a_body_with_the_maximum_of_token_ids_is_read() -> None:
    bodies._check_values(json.dumps({"prompt": [[7] * 100_000] * 64}).encode())


# over HTTP


@pytest.fixture
async def server() -> AsyncIterator[GatewayServer]:
    config = ClusterConfig.model_validate(
        {
            "listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"},
            "limits": {"max_tokens": 200, "max_n": 4},
            "model": {"path": "tiny"},
        }
    )
    cluster = ScriptedCluster(byte_level())
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    yield gateway
    await gateway.stop(0)


async def test_clients_cannot_see_where_their_request_was_read(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as client:

        async def answers() -> list[tuple[int, str]]:
            got = []
            for route, body in TABLE:
                if body == MANY_MESSAGES:
                    continue  # it is read in the process in any case
                response = await client.post(PATHS[route], json=body, headers={"x-request-id": "id"})
                text = response.text if response.status_code >= 400 else json.dumps(list(response.text)[:10])
                got.append((response.status_code, text))
            return got

        here = await answers()
        assert server.offload.pid is None
        monkeypatch.setattr(bodies, "SMALL_BYTES", -1)
        assert await answers() == here
        assert server.offload.pid is not None
