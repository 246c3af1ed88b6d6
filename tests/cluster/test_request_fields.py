"""Fields of requests with real workers: the first token comes from one, the others from another."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pdserve.embedded import MODEL_DIR
from pdserve.gateway.text.tokenizer import Tokenizer

from .harness import Cluster, Clusters

pytestmark = pytest.mark.cluster
ASK: dict[str, Any] = {
    "prompt": "The for statement",
    "max_tokens": 40,
    "temperature": 0,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def cluster(clusters: Clusters) -> Cluster:
    return clusters.get()


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=f"http://{cluster._launched.http_address}", trust_env=False, timeout=60
    ) as http:
        yield http
    cluster.check_all_blocks_free()


def complete(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/completions", json=ASK | fields)
    assert response.is_success, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def contains(token_ids: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(token_ids[i : i + len(word)]) == word for i in range(len(token_ids)))


def test_bad_words_do_not_come_from_either_worker(http: httpx.Client) -> None:
    tokenizer = Tokenizer.load(MODEL_DIR)
    (free,) = complete(http)
    words = [tokenizer.piece(free["token_ids"][index]) for index in (0, 1, 2, 5)]
    words.append(tokenizer.decode(free["token_ids"][7:10]))
    words = [word for word in words if word.strip()]
    barred = [tokenizer.encode(prefix + word.lstrip(), False) for word in words for prefix in ("", " ")]
    assert any(contains(free["token_ids"], word) for word in barred)
    sampled = {"n": 3, "temperature": 1.0, "seed": 1, "logprobs": 2}
    for fields in ({}, sampled, {"guided_regex": "[a-z ]{10,60}"}):
        for choice in complete(http, bad_words=words, **fields):
            assert choice["token_ids"]
            for word in barred[::2]:
                assert not contains(choice["token_ids"], word)
    assert complete(http, bad_words=words) == complete(http, bad_words=words)


def test_a_scored_prompt_has_the_log_probabilities_of_an_echo(http: httpx.Client) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 3, "prompt": "The for statement is used to loop"}
    (scored,) = complete(http, **fields, max_tokens=0)
    (echoed,) = complete(http, **fields, max_tokens=1)
    assert (scored["text"], scored["token_ids"]) == (fields["prompt"], [])
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert scored["logprobs"][name] == echoed["logprobs"][name][:-1]


def test_the_checkpoints_defaults_draw_the_tokens_of_silent_requests(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["default_sampling"] == {"temperature": 0.7, "top_p": 0.95}
    silent = complete(http, temperature=None, seed=5)
    assert silent == complete(http, **model["default_sampling"], seed=5)
    assert silent != complete(http, temperature=1.0, top_p=1.0, seed=5)


def test_a_truncated_prompt_continues_as_its_end(http: httpx.Client) -> None:
    tail = Tokenizer.load(MODEL_DIR).encode("The while statement repeats. " * 30 + "The for statement")[-20:]
    text = "The while statement repeats. " * 30 + "The for statement"
    (truncated,) = complete(http, prompt=text, truncate_prompt_tokens=20)
    (whole,) = complete(http, prompt=list(tail))
    assert truncated == whole
