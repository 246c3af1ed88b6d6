"""The HTTP server of a real cluster: the same answers as by gRPC, and no resources held for clients that
leave."""

import json
from collections.abc import Iterator

import httpx
import pytest

from .harness import Cluster, Clusters, tokens_of

pytestmark = pytest.mark.cluster
PROMPT = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager."
)
BODY = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster(clusters: Clusters) -> Cluster:
    return clusters.get()


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    address = cluster._launched.http_address
    with httpx.Client(base_url=f"http://{address}", timeout=60, trust_env=False) as client:
        yield client
    cluster.check_all_blocks_free()


def test_both_servers_give_the_same_tokens(cluster: Cluster, http: httpx.Client) -> None:
    events = cluster.stream(cluster.request(PROMPT, max_tokens=20))
    body = BODY | {"max_tokens": 20, "return_token_ids": True, "n": 2}
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [tokens_of(events)] * 2
    assert answer["choices"][0]["text"] == "".join(e.tokens.text for e in events if e.HasField("tokens"))


def test_a_client_that_leaves_frees_everything_on_both_workers(cluster: Cluster, http: httpx.Client) -> None:
    body = BODY | {"prompt": [PROMPT, PROMPT[:50]], "max_tokens": 1500, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        first = next(line for line in response.iter_lines() if line)
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
    cluster.check_all_blocks_free()


def test_a_started_cluster_reports_itself_started(http: httpx.Client) -> None:
    started = http.get("/startupz")
    assert (started.status_code, started.json()["phase"], started.json()["progress"]) == (200, "started", 1.0)
    assert [http.get(path).status_code for path in ("/health", "/readyz", "/livez")] == [200, 200, 200]
