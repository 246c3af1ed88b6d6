"""End to end: a gRPC client's output equals that of `transformers`, for every ratio, while the ratio
changes."""

from typing import Any

import pytest
import torch

from pdserve.proto import pdserve_pb2 as pb

from ..checkpoints import reference_model
from ..exactness.test_joined_engines import random_prompts, reference
from .conftest import Checkpoints
from .harness import Clusters, tokens_of, workers_of

pytestmark = pytest.mark.cluster
MAX_BATCH_SIZE = 4
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
        ("mistral-sliding-100-mha", PAIR),
        ("qwen2-tied", PAIR),
        ("qwen3", PAIR),
    ],
)
def test_every_ratio_serves_the_tokens_of_transformers(
    name: str, ratios: tuple[tuple[int, int], ...], checkpoints: Checkpoints, clusters: Clusters
) -> None:
    """Which model it is and which ratio are independent of each other: every family in one, one in all."""
    path = checkpoints[name]
    prompts = random_prompts((1, 5, 16, 40, 100, 300, 1500), seed=len(name))
    expected = reference(path, prompts)
    for prefill, decode in ratios:
        cluster = clusters.get(path, prefill, decode, max_batch_size=MAX_BATCH_SIZE)
        used: set[str] = set()
        # the first round is cold and alone; then more come at once than one worker takes
        for number in range(40):
            requests = [
                cluster.request(prompt, salt=f"{prefill}{decode}{number}{copy}", logprobs=0)
                for copy in range(1 if number == 0 else MAX_BATCH_SIZE)
                for prompt in prompts
            ]
            streams = cluster.generate_all(requests)
            used |= check_round(streams, expected * (len(streams) // len(expected)))
            if len(used) == prefill + decode:
                break
        assert len(used) == prefill + decode
        cluster.check_all_blocks_free()


def test_sampled_output_depends_on_the_seed_alone(checkpoints: Checkpoints, clusters: Clusters) -> None:
    """Alone, in a batch, and on other workers."""
    prompts = random_prompts((4, 50, 90), seed=2)
    path = checkpoints["qwen3"]  # which is served already
    cluster = clusters.get(path, max_batch_size=MAX_BATCH_SIZE)
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "n": 2, "seed": 99}
    requests = [cluster.request(prompt, **options) for prompt in prompts]
    alone = [[tokens_of(cluster.stream(request), choice) for choice in (0, 1)] for request in requests]
    assert alone[0][0] != alone[0][1]
    cluster = clusters.get(path, prefill=2, decode=2, max_batch_size=MAX_BATCH_SIZE)
    for number, events in enumerate(cluster.generate_all(requests * 3)):
        assert [tokens_of(events, choice) for choice in (0, 1)] == alone[number % 3]
    cluster.check_all_blocks_free()


def test_a_checkpoint_in_bfloat16_is_served_in_float32_when_asked(
    checkpoints: Checkpoints, clusters: Clusters
) -> None:
    path = checkpoints["llama-bf16"]
    (prompt,) = random_prompts((64,), seed=4)
    ids = torch.tensor([prompt])
    model = reference_model(path)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    cluster = clusters.get(path, model={"path": str(path), "dtype": "float32", "max_model_len": 2048})
    assert tokens_of(cluster.stream(cluster.request(prompt))) == out[0, 64:].tolist()
