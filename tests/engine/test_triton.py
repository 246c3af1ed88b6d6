"""An engine over Triton's kernels, in the interpreter, produces the same output as transformers."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.device import HostDevice
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.sequence import Sequence
from pdserve.kernels.triton.launch import INTERPRETED
from tests.checkpoints import reference_model, small_checkpoint
from tests.engine.device_engine import filled_with_nan, open_device_engine
from tests.engine.driver import make_sequence, random_prompt, run_to_end
from tests.engine.greedy import Reference, assert_equal, generate_greedily

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="an engine's tensors are on the host: only the interpreter takes them"
)

NUM_TOKENS = 3
VARIANTS = ["llama-gqa", "qwen3", "qwen3-sliding-mixed"]

Open = Callable[[str, int], Engine]
Generate = Callable[[str, tuple[int, ...]], Reference]


@pytest.fixture(scope="module", autouse=True)
def _without_lucky_memory() -> Iterator[None]:
    with filled_with_nan():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: small_checkpoint(directory, name))


@pytest.fixture(scope="module")
def open_engine(checkpoint: Callable[[str], Path]) -> Open:
    """open_engine(name, block_size): one for all tests, as a device's engine computes much when it is opened."""

    @cache
    def make(name: str, block_size: int) -> Engine:
        options = EngineOptions(
            device="cuda",
            dtype="float32",
            block_size=block_size,
            num_blocks=40,
            max_model_len=128,
            max_batch_size=3,
        )
        engine = open_device_engine(checkpoint(name), options, HostDevice())
        assert engine.kernels.name == "triton"
        return engine

    return make


@pytest.fixture(scope="module")
def generate(checkpoint: Callable[[str], Path]) -> Generate:
    models: Callable[[str], Any] = cache(lambda name: reference_model(checkpoint(name)))
    return cache(lambda name, prompt: generate_greedily(models(name), prompt, NUM_TOKENS))


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(random_prompt(384, length, length))


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_of_mixed_lengths_in_chunks_equal_transformers(
    name: str, open_engine: Open, generate: Generate
) -> None:
    """Steps have long chunks, chunks of one token beside long ones, only short ones, and only single
    tokens."""
    engine = open_engine(name, 16)
    prompts = [prompt_of(length) for length in (1, 9, 27)]
    sequences = [make_sequence(engine, prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
    for output, prompt in zip(run_to_end(engine, sequences, max_chunk=13), prompts, strict=True):
        assert_equal(output, generate(name, prompt))


@pytest.mark.parametrize(
    ("name", "page", "other_page", "length"),
    [*((name, 16, 8, 26) for name in VARIANTS), ("llama-gqa", 128, 64, 26), ("llama-gqa", 16, 128, 25)],
)
def test_a_sequence_continues_exactly_in_an_engine_that_received_its_kv(
    name: str, page: int, other_page: int, length: int, open_engine: Open, generate: Generate
) -> None:
    source, target = open_engine(name, page), open_engine(name, other_page)
    prompt = prompt_of(length)  # unknown to both engines' caches
    reference = generate(name, prompt)
    prefilled = make_sequence(source, prompt, max_tokens=NUM_TOKENS)
    source.kv.admit(prefilled)
    assert source.kv.grow(prefilled, len(prompt))
    ((first,),) = source.runner.launch(Batch((ScheduledChunk(prefilled, len(prompt), (0,)),), ())).collect()

    arrived = make_sequence(target, prompt, output=[first.token_id], max_tokens=NUM_TOKENS)
    target.kv.admit(arrived)
    assert target.kv.grow(arrived, len(prompt))
    send(source, prefilled, target, arrived, len(prompt))
    target.kv.received(arrived, len(prompt))
    assert arrived.num_uncomputed_tokens == 1
    assert_equal([first, *run_to_end(target, [arrived])[0]], reference)


def send(source: Engine, prefilled: Sequence, target: Engine, arrived: Sequence, num_tokens: int) -> None:
    """Transfers KV layer by layer, in chunks of tokens."""
    for layer in range(source.config.num_layers):
        for start in range(0, num_tokens, 20):
            end = min(start + 20, num_tokens)
            wire = memoryview(
                bytearray((end - start) * source.layout.bytes_per_token // source.config.num_layers)
            )
            checksum = source.cache.gather(layer, layer + 1, prefilled.block_ids, start, end, wire)
            assert target.cache.checksum(wire) == checksum
            target.cache.scatter(layer, layer + 1, arrived.block_ids, start, end, wire)
