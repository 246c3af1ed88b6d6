"""Outputs that follow a grammar, from a real cluster: valid, unchanged by deaths, and harmless to other
requests."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from pdserve.proto import pdserve_pb2 as pb

from ..processes import await_end
from .harness import Cluster, Clusters, session_processes, text_of, tokens_of

pytestmark = pytest.mark.cluster
PROMPT = "The with statement is used to wrap the execution of a block"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["statement", "function", "class"]},
        "lines": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 12,
            "maxItems": 14,
        },
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
    },
    "required": ["kind", "lines", "name"],
    "additionalProperties": False,
}
LATE_BOMB = 'start: "ab" BOMB\nBOMB: /(c{1000}){1000}/'


@pytest.fixture(scope="module")
def shared(clusters: Clusters) -> Iterator[Cluster]:
    yield clusters.get(prefill=1, decode=2)
    processes = grammar_processes()
    assert processes
    clusters.end()
    for pid in processes:  # a killed worker's grammar process outlives it briefly
        await_end(pid)


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.wait_for(prefill=1, decode=2)
    shared.check_all_blocks_free()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    http_client: Any = httpx.Client(trust_env=False)  # openai's types may be those of its successor
    yield openai.OpenAI(
        base_url=f"http://{cluster._launched.http_address}/v1", api_key="none", http_client=http_client
    )
    http_client.close()


def constrained(cluster: Cluster, constraint: pb.Constraint | None, **sampling: Any) -> pb.GenerateRequest:
    options: dict[str, Any] = {
        "max_tokens": 1000,
        "temperature": 1.0,
        "seed": 3,
        "ignore_eos": False,
    } | sampling
    return cluster.request(PROMPT, constraint=constraint, **options)


def grammar_processes() -> set[int]:
    return {pid for pid, command in session_processes().items() if "pdserve.grammar" in command}


def test_every_choice_fits_the_schema(cluster: Cluster) -> None:
    request = constrained(cluster, pb.Constraint(json_schema=json.dumps(SCHEMA)), n=3)
    events = cluster.stream(request)
    texts = [text_of(events, choice) for choice in range(3)]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) == 3


def test_many_constrained_and_free_streams_run_together(cluster: Cluster) -> None:
    kinds = [
        pb.Constraint(regex=r"(one|two) [a-z]{3,20}\."),
        pb.Constraint(choice=pb.Choices(texts=["yes", "no"])),
        pb.Constraint(json_object=True),
        None,
    ]
    requests = [
        constrained(cluster, kind, seed=number, max_tokens=40) for number in range(4) for kind in kinds
    ]
    streams = cluster.generate_all(requests)
    again = cluster.generate_all(requests[:4])
    assert [tokens_of(events) for events in streams[:4]] == [tokens_of(events) for events in again]
    assert {text_of(events) for events in streams[1::4]} <= {"yes", "no"}


def test_the_official_client_gets_what_it_asked_for(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        verdict: Literal["good", "bad"]
        score: Literal[1, 2, 3]

    completion = client.chat.completions.parse(
        model="embedded",
        messages=[{"role": "user", "content": "How is it?"}],
        response_format=Answer,
        max_tokens=300,
    )
    assert isinstance(completion.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(
        model="embedded",
        messages=[{"role": "user", "content": "How is it?"}],
        response_format=Answer,
        max_tokens=300,
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)
    answer = client.completions.create(
        model="embedded",
        prompt=PROMPT,
        max_tokens=50,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
    )
    assert answer.choices[0].text.isdigit() and len(answer.choices[0].text) == 4


def test_constrained_output_survives_deaths_of_decode_worker_and_grammar_processes(cluster: Cluster) -> None:
    request = constrained(cluster, pb.Constraint(json_schema=json.dumps(SCHEMA)), seed=11)
    expected = tokens_of(cluster.stream(request))

    def victims_of_worker() -> list[int]:
        busy = [
            w
            for w in cluster.admin.GetStatus(pb.GetStatusRequest()).workers
            if w.role == "decode" and w.num_running
        ]
        return [w.pid for w in busy]

    for victims in (victims_of_worker, lambda: sorted(grammar_processes())):
        call = cluster.generation.GenerateStream(request, timeout=120)
        events = [next(iter(call))]
        for pid in victims():
            os.kill(pid, signal.SIGKILL)
        events += call
        assert tokens_of(events) == expected
        cluster.wait_for(prefill=1, decode=2)


def test_a_grammar_that_turns_out_too_costly_ends_its_own_request_only(cluster: Cluster) -> None:
    others = [cluster.generation.GenerateStream(constrained(cluster, None, max_tokens=100), timeout=120)]
    kind = pb.Constraint(json_schema=json.dumps(SCHEMA))
    others.append(cluster.generation.GenerateStream(constrained(cluster, kind, seed=5), timeout=120))
    firsts = [next(iter(call)) for call in others]
    with pytest.raises(grpc.RpcError) as caught:
        cluster.stream(constrained(cluster, pb.Constraint(grammar=LATE_BOMB)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for first, call in zip(firsts, others, strict=True):
        assert tokens_of([first, *call])
