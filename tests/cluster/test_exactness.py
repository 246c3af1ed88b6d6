"""End to end: a gRPC client's output equals that of `transformers`, for every ratio, while the ratio
changes."""

from typing import Any

import pytest
import torch

from pdserve.proto import pdserve_pb2 as pb

from ..checkpoints import reference_model
from ..exactness.test_joined_engines import random_prompts, reference
from .conftest import Checkpoints
from .harness import Cluster, tokens_of, workers_of

pytestmark = pytest.mark.cluster
PAIR, RATIOS = ((1, 1),), ((1, 1), (2, 1), (1, 2))


def check_round(
    streams: list[list[pb.GenerateEvent]], expected: list[tuple[list[int], list[float]]]
) -> set[str]:
    """Checks tokens and logprobs of every stream; returns the workers that served them, never one for both
    phases."""
    used = set()
    for events, (tokens, logprobs) in zip(streams, expected, strict=True):
        assert tokens_of(events) == tokens
        seen = [lp.logprob for e in events if e.HasField("tokens") for lp in e.tokens.logprobs]
        assert seen == pytest.approx(logprobs, abs=1e-4)
        p, d = workers_of(events)
        assert p != d
        used |= {p, d}
    return used


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("llama-gqa", RATIOS),
        ("qwen3", RATIOS),
        ("mistral-sliding-100-mha", PAIR),
        ("qwen2-tied", PAIR),
        ("llama3-rope", PAIR),
    ],
)
def test_every_ratio_serves_the_tokens_of_transformers(
    name: str, ratios: tuple[tuple[int, int], ...], checkpoints: Checkpoints
) -> None:
    """Which model it is and which ratio are independent of each other: every model in one, two in all."""
    path = checkpoints[name]
    prompts = random_prompts((1, 5, 16, 40, 100, 300, 1500), seed=len(name))
    expected = reference(path, prompts)
    cluster = Cluster(path)
    try:
        for prefill, decode in ratios:
            cluster.apply(prefill=prefill, decode=decode)
            cluster.wait_for(prefill=prefill, decode=decode)
            used: set[str] = set()
            # the first round is cold; it takes load until every worker has had its share
            for number in range(40):
                requests = [
                    cluster.request(prompt, salt=f"{prefill}{decode}{number}", logprobs=0)
                    for prompt in prompts
                ]
                used |= check_round(cluster.generate_all(requests), expected)
                if len(used) == prefill + decode:
                    break
            assert len(used) == prefill + decode
            cluster.check_all_blocks_free()
    finally:
        cluster.close()


def test_sampled_output_depends_on_the_seed_alone(checkpoints: Checkpoints) -> None:
    """Alone, in a batch, and on other workers."""
    prompts = random_prompts((4, 50, 90), seed=2)
    cluster = Cluster(checkpoints["qwen3"])
    try:
        options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "n": 2, "seed": 99}
        requests = [cluster.request(prompt, **options) for prompt in prompts]
        alone = [[tokens_of(cluster.stream(request), choice) for choice in (0, 1)] for request in requests]
        assert alone[0][0] != alone[0][1]
        cluster.apply(prefill=2, decode=2)
        cluster.wait_for(prefill=2, decode=2)
        for number, events in enumerate(cluster.generate_all(requests * 3)):
            assert [tokens_of(events, choice) for choice in (0, 1)] == alone[number % 3]
    finally:
        cluster.close()


def test_a_checkpoint_in_bfloat16_is_served_in_float32_when_asked(checkpoints: Checkpoints) -> None:
    path = checkpoints["llama-bf16"]
    (prompt,) = random_prompts((64,), seed=4)
    cluster = Cluster(path, model={"path": str(path), "dtype": "float32", "max_model_len": 2048})
    try:
        ids = torch.tensor([prompt])
        model = reference_model(path)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokens_of(cluster.stream(cluster.request(prompt))) == out[0, 64:].tolist()
    finally:
        cluster.close()
