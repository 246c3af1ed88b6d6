"""Both servers, gRPC and HTTP, accept and refuse the same requests, with the same message and status."""

import json
from typing import Any

import grpc
import httpx
import pytest

from pdserve.core.errors import DuplicateRequest, NoWorkerAvailable, PdserveError, QueueFull
from pdserve.core.request import FinishReason
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.both_apis import Stub, check_same, over_grpc, over_http
from tests.gateway.support import ScriptedCluster

TEXT = pb.Prompt(text="hello")
NAN = float("nan")


def ask(prompt: pb.Prompt = TEXT, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, **fields)


def sample(**sampling: Any) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    """The same parameters for both servers."""
    return ask(sampling=pb.SamplingParams(**sampling)), {"prompt": "hello"} | sampling


def ids(*token_ids: int) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    return ask(pb.Prompt(token_ids=pb.TokenIds(ids=token_ids))), {"prompt": list(token_ids)}


def chat(*roles: str) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": role, "content": "hi"} for role in roles]
    prompt = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(**message) for message in messages]))
    return ask(prompt), {"messages": messages}


def constrain(
    constraint: pb.Constraint, outputs: dict[str, Any], **sampling: Any
) -> tuple[pb.GenerateRequest, dict[str, Any]]:
    """The same constraint for both servers."""
    message = ask(sampling=pb.SamplingParams(constraint=constraint, **sampling))
    return message, {"prompt": "hello", "structured_outputs": outputs} | sampling


DEEP = '{"items":' * 500 + "{}" + "}" * 500
BOMB = "(a{1000}){1000}"  # compiles at once, and takes a second a token
INTEGER = {"name": "number", "strict": True, "schema": {"type": "integer"}}
USER = [pb.ChatMessage(role="user", content="hi")]
DEEP_LIST: list[Any] = []
for _ in range(120):
    DEEP_LIST = [DEEP_LIST]
REFUSED = {
    "empty text": (ask(pb.Prompt(text="")), {"prompt": ""}),
    "no tokens": ids(),
    "long prompt": ids(*[5] * 256),
    "long text": (ask(pb.Prompt(text="a b c " * 3000)), {"prompt": "a b c " * 3000}),
    "unknown token": ids(5, 500),
    "huge token": ids(2**32 - 1),
    "no messages": chat(),
    "template refuses": chat("user", "system"),
    "another model": (ask(model="gpt"), {"prompt": "hello", "model": "gpt"}),
    "long salt": (ask(cache_salt="x" * 129), {"prompt": "hello", "cache_salt": "x" * 129}),
    "temperature": sample(temperature=-0.5),
    "top_p zero": sample(top_p=0.0),
    "top_p too high": sample(top_p=1.5),
    "top_k": sample(top_k=-2),
    "min_p": sample(min_p=1.5),
    "repetition_penalty": sample(repetition_penalty=0.0),
    "presence_penalty": sample(presence_penalty=2.5),
    "frequency_penalty": sample(frequency_penalty=-2.5),
    "max_tokens over the limit": sample(max_tokens=201),
    "no max_tokens": sample(max_tokens=0),
    "negative max_tokens": sample(max_tokens=-1),
    "no room for max_tokens": (
        ask(pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 200)), sampling=pb.SamplingParams(max_tokens=100)),
        {"prompt": [5] * 200, "max_tokens": 100},
    ),
    "min_tokens over max_tokens": sample(min_tokens=5, max_tokens=4),
    "negative min_tokens": sample(min_tokens=-1),
    "many choices": sample(n=2**31 - 1),
    "no choices": sample(n=0),
    "negative choices": sample(n=-1),
    "logprobs": sample(logprobs=21),
    "negative logprobs": sample(logprobs=-1),
    "empty stop string": sample(stop=["a", ""]),
    "long stop string": sample(stop=["a" * 1025]),
    "many stop strings": sample(stop=["a"] * 17),
    "unknown biased token": (
        ask(sampling=pb.SamplingParams(logit_bias={500: 1.0})),
        {"prompt": "hello", "logit_bias": {"500": 1.0}},
    ),
    "bias": (
        ask(sampling=pb.SamplingParams(logit_bias={5: 100.5})),
        {"prompt": "hello", "logit_bias": {"5": 100.5}},
    ),
    "a name that acts": (ask(cache_salt="a\nb"), {"prompt": "hello", "cache_salt": "a\nb"}),
    "unknown stop token": sample(stop_token_ids=[5, 500]),
    "no constraint": constrain(pb.Constraint(), {}),
    "no JSON object": constrain(pb.Constraint(json_object=False), {"json_object": False}),
    "a schema that is none": constrain(pb.Constraint(json_schema="[1]"), {"json": "[1]"}),
    "a schema of an unknown type": constrain(
        pb.Constraint(json_schema='{"type":"point"}'), {"json": {"type": "point"}}
    ),
    "a schema with other servers' addresses": constrain(
        pb.Constraint(json_schema='{"$ref":"http://127.0.0.1/"}'), {"json": {"$ref": "http://127.0.0.1/"}}
    ),
    "a deep schema": constrain(pb.Constraint(json_schema=DEEP), {"json": DEEP}),
    "a wrong expression": constrain(pb.Constraint(regex="((("), {"regex": "((("}),
    "a grammar that is none": constrain(pb.Constraint(grammar="hello"), {"grammar": "hello"}),
    "a grammar in another form": constrain(
        pb.Constraint(grammar=' {"grammars":[]}'), {"grammar": ' {"grammars":[]}'}
    ),
    "a grammar bomb": constrain(pb.Constraint(regex=BOMB), {"regex": BOMB}),
    "a long grammar": constrain(pb.Constraint(regex="a" * 65536), {"regex": "a" * 65536}),
    "no choice": constrain(pb.Constraint(choice=pb.Choices()), {"choice": []}),
    "an empty choice": constrain(pb.Constraint(choice=pb.Choices(texts=["a", ""])), {"choice": ["a", ""]}),
    "many bad words": sample(bad_words=["a"] * 257),
    "a long bad word": sample(bad_words=["a", "b" * 257]),
    "a blank bad word": sample(bad_words=["a", " "]),
    "a truncation to nothing": (
        ask(pb.Prompt(text="hello", truncate_tokens=0)),
        {"prompt": "hello", "truncate_prompt_tokens": 0},
    ),
    "a truncation to more than the model takes": (
        ask(pb.Prompt(text="hello", truncate_tokens=256)),
        {"prompt": "hello", "truncate_prompt_tokens": 256},
    ),
    "a long text to be truncated": (
        ask(pb.Prompt(text="a b c " * 3000, truncate_tokens=5)),
        {"prompt": "a b c " * 3000, "truncate_prompt_tokens": 5},
    ),
    "documents without a place": (
        ask(pb.Prompt(chat=pb.Chat(messages=USER, documents=[pb.Document(fields={"text": "a"})]))),
        {"messages": [{"role": "user", "content": "hi"}], "documents": [{"text": "a"}]},
    ),
    "a variable that hides the messages": (
        ask(pb.Prompt(chat=pb.Chat(messages=USER, template_kwargs='{"messages":[]}'))),
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"messages": []}},
    ),
    "a deep variable": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=USER, template_kwargs=json.dumps({"a": DEEP_LIST}, separators=(",", ":"))
                )
            )
        ),
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": DEEP_LIST}},
    ),
    "a large variable": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=USER, template_kwargs=json.dumps({"a": "x" * 66_000}, separators=(",", ":"))
                )
            )
        ),
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": "x" * 66_000}},
    ),
    "many variables": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=USER,
                    template_kwargs=json.dumps({f"a{i}": 1 for i in range(65)}, separators=(",", ":")),
                )
            )
        ),
        {
            "messages": [{"role": "user", "content": "hi"}],
            "chat_template_kwargs": {f"a{i}": 1 for i in range(65)},
        },
    ),
    "a variable of no name": (
        ask(pb.Prompt(chat=pb.Chat(messages=USER, template_kwargs='{"__class__":1}'))),
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"__class__": 1}},
    ),
    "a message that goes on beside a new one": (
        ask(pb.Prompt(chat=pb.Chat(messages=USER, add_generation_prompt=True, continue_final_message=True))),
        {
            "messages": [{"role": "user", "content": "hi"}],
            "add_generation_prompt": True,
            "continue_final_message": True,
        },
    ),
    "several at once": sample(temperature=-1.0, top_p=2.0, n=0, stop=[""], max_tokens=500),
    "a constraint without its end": constrain(pb.Constraint(regex="a"), {"regex": "a"}, ignore_eos=True),
}
TAKEN = {
    "defaults": sample(),
    "token ids": ids(5, 6, 7),
    "conversation": chat("system", "user", "assistant", "user"),
    "everything": sample(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        seed=2**64 - 1,
        n=3,
        stop=["one", "two"],
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=2,
    ),
    "JSON": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(json_object=True))),
        {"prompt": "hello", "response_format": {"type": "json_object"}},
    ),
    "a schema": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(json_schema='{"type":"integer"}'))),
        {"prompt": "hello", "response_format": {"type": "json_schema", "json_schema": INTEGER}},
    ),
    "a schema as text": constrain(
        pb.Constraint(json_schema='{"type":"integer"}'), {"json": '{"type":"integer"}'}
    ),
    "JSON as in vLLM": constrain(pb.Constraint(json_object=True), {"json_object": True}),
    "an expression": constrain(pb.Constraint(regex="a+"), {"regex": "a+"}),
    "a grammar": constrain(pb.Constraint(grammar='start: "a"'), {"grammar": 'start: "a"'}),
    "a choice": constrain(pb.Constraint(choice=pb.Choices(texts=["a", "b"])), {"choice": ["a", "b"]}),
    "bias": (
        ask(sampling=pb.SamplingParams(logit_bias={5: -1.0, 6: 2.0})),
        {"prompt": "hello", "logit_bias": {"6": 2.0, "5": -1.0}},
    ),
    "an older name of a schema": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(json_schema='{"type":"integer"}'))),
        {"prompt": "hello", "guided_json": {"type": "integer"}},
    ),
    "an older name of an expression": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(regex="a+"))),
        {"prompt": "hello", "guided_regex": "a+", "guided_decoding_backend": "xgrammar"},
    ),
    "an older name of a grammar": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(grammar='start: "a"'))),
        {"prompt": "hello", "guided_grammar": 'start: "a"'},
    ),
    "an older name of a choice": (
        ask(sampling=pb.SamplingParams(constraint=pb.Constraint(choice=pb.Choices(texts=["a"])))),
        {"prompt": "hello", "guided_choice": ["a"]},
    ),
    "bad words": sample(bad_words=["the", " quick brown", "dog"]),
    "a truncated text": (
        ask(pb.Prompt(text="a b c " * 500, truncate_tokens=9)),
        {"prompt": "a b c " * 500, "truncate_prompt_tokens": 9},
    ),
    "truncated tokens": (
        ask(pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 300 + [6, 7]), truncate_tokens=2)),
        {"prompt": [5] * 300 + [6, 7], "truncate_prompt_tokens": 2},
    ),
    "tokens that leave room for the output": (
        ask(
            pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 300), truncate_tokens=-1),
            sampling=pb.SamplingParams(max_tokens=56),
        ),
        {"prompt": [5] * 300, "truncate_prompt_tokens": -1, "max_tokens": 56},
    ),
    "a truncated conversation": (
        ask(
            pb.Prompt(
                chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a b c " * 500)]),
                truncate_tokens=20,
            )
        ),
        {"messages": [{"role": "user", "content": "a b c " * 500}], "truncate_prompt_tokens": 20},
    ),
    "a message that goes on": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=[pb.ChatMessage(role="assistant", content="hi")], continue_final_message=True
                )
            )
        ),
        {"messages": [{"role": "assistant", "content": "hi"}], "continue_final_message": True},
    ),
    "variables of the template": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=[pb.ChatMessage(role="user", content="hi")],
                    template_kwargs='{"enable_thinking":false}',
                )
            )
        ),
        {
            "messages": [{"role": "user", "content": "hi"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    "the older of two lengths": (
        ask(sampling=pb.SamplingParams(max_tokens=3)),
        {"prompt": "hello", "max_tokens": 9, "max_completion_tokens": 3},
    ),
    "a scored prompt": (
        ask(sampling=pb.SamplingParams(max_tokens=0, prompt_logprobs=2, logprobs=2)),
        {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 2},
    ),
    "names": (
        ask(model="tiny", cache_salt="s", client_id="alice"),
        {"prompt": "hello", "model": "tiny", "cache_salt": "s", "user": "alice"},
    ),
}


async def test_both_refuse_it_with_the_same_message(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, subtests: pytest.Subtests
) -> None:
    for name, (request, body) in REFUSED.items():
        with subtests.test(name):
            refusal = await over_grpc(generation, request)
            for stream in (False, True):
                check_same(refusal, await over_http(http, body | {"stream": stream}))
            assert cluster.requests == []


async def test_both_accept_it_and_make_the_same_request_of_it(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, subtests: pytest.Subtests
) -> None:
    for name, (request, body) in TAKEN.items():
        cluster.requests.clear()
        with subtests.test(name):
            request = pb.GenerateRequest.FromString(request.SerializeToString())
            request.request_id = "mine"
            if "messages" in body:
                request.sampling.max_tokens = body["max_tokens"] = 9
            if not request.client_id:
                request.client_id = body["user"] = "alice"
            await generation.Generate(request)
            assert (await over_http(http, body, **{"x-request-id": "mine"})).status_code == 200
            over_one, over_the_other = cluster.requests
            assert over_one == over_the_other


async def test_both_refuse_a_long_name(generation: Stub, http: httpx.AsyncClient) -> None:
    refusal = await over_grpc(generation, ask(request_id="x" * 129))
    check_same(refusal, await over_http(http, {"prompt": "hello"}, **{"x-request-id": "x" * 129}))


@pytest.mark.parametrize(
    ("user", "expected"), [("x" * 129, "at most 128 characters"), ("a\nb", "printable characters")]
)
@pytest.mark.parametrize("body", [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}])
async def test_each_refuses_a_user_by_the_name_of_its_own_field(
    generation: Stub,
    http: httpx.AsyncClient,
    cluster: ScriptedCluster,
    body: dict[str, Any],
    user: str,
    expected: str,
) -> None:
    refusal = await over_grpc(generation, ask(client_id=user))
    response = await over_http(http, body | {"user": user})
    error, details = response.json()["error"], refusal.details() or ""
    assert (response.status_code, error["param"]) == (400, "user")
    assert details.startswith("client_id: ") and details.endswith(expected)
    assert error["message"] == details.replace("client_id", "user", 1)
    assert cluster.requests == []


@pytest.mark.parametrize(
    "refusal", [QueueFull(1024, 1.5), DuplicateRequest("mine"), NoWorkerAvailable("no worker is ready")]
)
async def test_both_report_the_routers_refusals(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, refusal: PdserveError
) -> None:
    cluster.refusal = refusal
    check_same(await over_grpc(generation, ask()), await over_http(http, {"prompt": "hello"}))


@pytest.mark.parametrize(
    "reason", [FinishReason.DEADLINE, FinishReason.CANCELLED, FinishReason.ERROR, FinishReason.INVALID]
)
async def test_both_report_how_a_request_ended(
    generation: Stub, http: httpx.AsyncClient, cluster: ScriptedCluster, reason: FinishReason
) -> None:
    cluster.ending = (reason, None)
    check_same(await over_grpc(generation, ask()), await over_http(http, {"prompt": "hello"}))


async def test_both_refuse_to_tokenize_and_detokenize_the_same(
    generation: Stub, http: httpx.AsyncClient
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as tokenize:
        await generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="")))
    check_same(tokenize.value, await http.post("/tokenize", json={"prompt": ""}))
    with pytest.raises(grpc.aio.AioRpcError) as detokenize:
        await generation.Detokenize(pb.DetokenizeRequest(token_ids=[1, 500]))
    check_same(detokenize.value, await http.post("/detokenize", json={"tokens": [1, 500]}))


async def test_both_report_the_same_tokens_text_and_usage(generation: Stub, http: httpx.AsyncClient) -> None:
    request, body = sample(max_tokens=9, n=2, stop=["jumps"], seed=1)
    one = await generation.Generate(request)
    other = (await over_http(http, body | {"return_token_ids": True})).json()
    for choice, http_choice in zip(one.choices, other["choices"], strict=True):
        assert (choice.text, list(choice.token_ids), choice.stop_string) == (
            http_choice["text"],
            http_choice["token_ids"],
            http_choice["stop_reason"],
        )
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.cached_tokens) == (
        other["usage"]["prompt_tokens"],
        other["usage"]["completion_tokens"],
        other["usage"]["prompt_tokens_details"]["cached_tokens"],
    )
