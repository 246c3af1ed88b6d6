"""A step on a GPU, as far as it can be tested without one: the host never waits, and no data of the step is
on the host."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.on_gpu.decode_graphs import ladder
from pdserve.engine.sequence import Sequence
from tests.checkpoints import small_checkpoint
from tests.engine.device_engine import open_device_engine
from tests.engine.driver import make_sequence
from tests.fake_gpu import HostWaits, fake_gpu

OPTIONS = EngineOptions(
    device="cuda", dtype="bfloat16", block_size=64, max_model_len=128, max_batch_size=16, max_batch_tokens=300
)


@pytest.fixture(params=["llama-gqa", "qwen3-sliding-mixed", "qwen2"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    path = small_checkpoint(tmp_path, request.param)
    with fake_gpu() as device:

        def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device.torch_device)

        device.is_starting = True
        engine = open_device_engine(path, OPTIONS, device, read)
        device.is_starting = False
        yield engine


def admit(engine: Engine, num_tokens: int) -> Sequence:
    seq = make_sequence(engine, range(num_tokens), max_tokens=9, logprobs=None)
    engine.kv.admit(seq)
    assert engine.kv.grow(seq, num_tokens)
    return seq


def test_prompts_decodes_and_mixtures_are_queued_without_a_wait(engine: Engine) -> None:
    old = [admit(engine, 5) for _ in range(3)]
    layers: list[int] = []
    engine.runner.launch(Batch(tuple(ScheduledChunk(seq, 5, (0,)) for seq in old), ((0, 1),)), layers.append)
    assert layers == list(range(engine.config.num_layers))
    for seq in old:
        engine.kv.computed(seq, 5)
        seq.append(3)
        assert engine.kv.grow(seq, 6)
    decodes = tuple(ScheduledChunk(seq, 1, (0,)) for seq in old)
    engine.runner.launch(Batch(decodes))
    new = admit(engine, 40)
    engine.runner.launch(Batch((*decodes, ScheduledChunk(new, 30, ()))))


def test_the_cache_takes_the_remaining_memory(engine: Engine) -> None:
    block_bytes = 64 * engine.layout.bytes_per_token
    assert engine.pool.num_blocks * block_bytes < 0.9 * (2 << 30) < 2 * engine.pool.num_blocks * block_bytes


@pytest.mark.parametrize(
    "wait",
    [
        lambda there: there.sum().item(),
        lambda there: there.cpu(),
        lambda there: there[there > 0],
        lambda there: there + torch.ones(4),
        lambda there: torch.empty(4).copy_(there),
    ],
    ids=["item", "cpu", "mask", "mixed", "blocking-copy"],
)
def test_the_fake_gpu_notices_every_wait(wait: Callable[[torch.Tensor], object]) -> None:
    with fake_gpu() as device:
        there = torch.zeros(4, device=device.torch_device)
        with pytest.raises((HostWaits, RuntimeError)):
            wait(there)


@pytest.mark.parametrize("largest", [1, 3, 8, 200, 256])
def test_the_ladder_fits_every_batch_with_few_surplus_rows(largest: int) -> None:
    rungs = ladder(largest)
    assert rungs == tuple(sorted(set(rungs))) and rungs[-1] == largest
    for size in range(1, largest + 1):
        rung = next(rung for rung in rungs if rung >= size)
        assert rung < 2 * size or rung == size, f"{size} sequences take {rung} rows"
