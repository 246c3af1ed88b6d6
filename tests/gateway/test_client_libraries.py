"""How libraries beside the official client read answers: litellm and LangChain of a context that is too
long, lm-eval of a scored prompt.

They run in an environment of their own (`make clients`, or CLIENTS_PYTHON names its interpreter). Without it
the same is tried against what their code looks for."""

import asyncio
import json
import os
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pdserve.gateway.app import GatewayServer
from tests.gateway.support import Built, ScriptedCluster, byte_level

CLIENTS = Path(__file__).parent / "clients"
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", CLIENTS.parent.parent.parent / ".venv-clients/bin/python"))
with_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason="the clients' environment is missing: make clients"
)
LONG = "a b c " * 200


async def printed_by(script: str, *arguments: str) -> dict[str, Any]:
    """Returns what a client's script prints, in JSON."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "no_proxy": "*"}
    process = await asyncio.create_subprocess_exec(
        str(PYTHON),
        str(CLIENTS / script),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    printed: dict[str, Any] = json.loads(out.splitlines()[-1])
    return printed


@with_clients
async def test_litellm_and_langchain_recognise_a_context_that_is_too_long(server: GatewayServer) -> None:
    found = await printed_by("overflow.py", f"http://{server.http_address}/v1")
    assert found and all(found.values()), found


CHAT = {"messages": [{"role": "user", "content": LONG}]}
TOO_LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "conversation": ("chat/completions", CHAT),
    "text": ("completions", {"prompt": LONG}),
    "token ids": ("completions", {"prompt": [5] * 256}),
    "characters": ("completions", {"prompt": "a" * 50_000}),
    "one of two prompts": ("completions", {"prompt": ["a", LONG]}),
    "room for the output": ("completions", {"prompt": [5] * 200, "max_tokens": 100}),
    "streamed": ("chat/completions", CHAT | {"stream": True}),
}


@pytest.mark.parametrize("name", TOO_LONG)
async def test_any_overflow_has_the_code_and_the_words_that_clients_look_for(
    http: httpx.AsyncClient, name: str
) -> None:
    """litellm 1.110.2 looks for "this model's maximum context length is" in the text in lower case
    (litellm_core_utils/exception_mapping_utils.py: is_error_str_context_window_exceeded), langchain-openai
    1.7.4 for "context_length_exceeded" in the error's text, which of recent openai clients has the message
    alone, or for "prompt is too long" in the message (chat_models/base.py: _handle_openai_bad_request)."""
    path, body = TOO_LONG[name]
    response = await http.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
    )
    assert "this model's maximum context length is 256 tokens" in error["message"].lower()
    assert "prompt is too long" in error["message"]


async def test_the_official_clients_error_names_the_code(server: GatewayServer) -> None:
    base_url = f"http://{server.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": LONG}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@with_clients
async def test_lm_eval_scores_prompts_offline(server: GatewayServer, tmp_path: Path) -> None:
    """The scripted cluster gives token i of a prompt the log probability -i."""
    byte_level().pretrained.save_pretrained(tmp_path)
    found = await printed_by("scoring.py", f"http://{server.http_address}/v1/completions", str(tmp_path))
    for (total, is_greedy), (num_context, num_all) in zip(
        found["loglikelihood"], found["tokens"], strict=True
    ):
        assert (total, is_greedy) == (-float(sum(range(num_context, num_all))), False)
    assert found["rolling"][0] < 0
    assert found["generated"] == ["the quick brown fox "]


def parsed_by_lm_eval(output: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval 0.4.13, models/openai_completions.py: LocalCompletionsAPI.parse_logprobs."""
    found = []
    choices = sorted(output["choices"], key=itemgetter("index"))
    for choice, context_length in zip(choices, context_lengths, strict=False):
        logprobs = choice["logprobs"]["token_logprobs"][context_length:-1]
        top = choice["logprobs"]["top_logprobs"][context_length:-1]
        is_greedy = all(one == max(best.values()) for one, best in zip(logprobs, top, strict=False))
        found.append((sum(logprobs), is_greedy))
    return found


async def test_the_bytes_that_lm_eval_sends_score_a_prompt(http: httpx.AsyncClient) -> None:
    """As LocalCompletionsAPI._create_payload of lm-eval 0.4.13 for tokenised requests, written by requests."""
    body = (
        b'{"model": "tiny", "prompt": [[5, 6, 7, 8, 9], [7, 8, 9]], "temperature": 0, "max_tokens": 1, '
        b'"logprobs": 1, "seed": 1234, "echo": true}'
    )
    headers = {"content-type": "application/json"}
    response = await http.post("/v1/completions", content=body, headers=headers)
    assert parsed_by_lm_eval(response.json(), [2, 1]) == [(-9.0, False), (-3.0, False)]


SCORES = {"prompt": "the quick brown fox", "max_tokens": 0, "echo": True, "logprobs": 2}


def ids(built: Built, text: str) -> list[int]:
    return list(built.encode(text))


async def test_no_tokens_with_echo_and_logprobs_score_a_prompt(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    answer = (await http.post("/v1/completions", json=SCORES | {"return_token_ids": True})).json()
    (choice,) = answer["choices"]
    num_prompt = len(ids(byte_level(), SCORES["prompt"]))  # type: ignore[arg-type]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (SCORES["prompt"], [], "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *(-float(i) for i in range(1, num_prompt))]
    assert all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0
    assert cluster.requests[0].sampling.max_tokens == 1, "the scores come with the token that is left out"


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"prompt": ["the quick", "the lazy dog"]}, {"stop": ["x"]}])
async def test_a_streamed_score_is_the_whole_one(http: httpx.AsyncClient, more: dict[str, Any]) -> None:
    body = SCORES | more
    whole = (await http.post("/v1/completions", json=body)).json()["choices"]
    lines = (await http.post("/v1/completions", json=body | {"stream": True})).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for choice in whole:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [chunk["logprobs"] for chunk in own if chunk["logprobs"]] == [choice["logprobs"]]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"


async def test_an_end_token_behind_a_scored_prompt_changes_nothing(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    cluster.eos_after = 0
    (choice,) = (await http.post("/v1/completions", json=SCORES)).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (SCORES["prompt"], "length")


async def test_no_tokens_are_refused_where_nothing_is_scored(http: httpx.AsyncClient) -> None:
    for body in (
        {"prompt": "a"},
        {"prompt": "a", "logprobs": 1},
        {"messages": [{"role": "user", "content": "a"}]},
    ):
        path = "chat/completions" if "messages" in body else "completions"
        error = (await http.post(f"/v1/{path}", json=body | {"max_tokens": 0})).json()["error"]
        assert error["param"] == "max_tokens" and "with echo" in error["message"]
