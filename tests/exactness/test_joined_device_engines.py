"""Two engines as they are on one GPU, in Triton's interpreter: their KV stays on the device, and their tokens
are those of `transformers`."""

from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.engine.engine import Engine, EngineOptions

from ..checkpoints import small_checkpoint
from ..engine.device_engine import filled_with_nan, open_device_engine
from ..kv_transfer.device_doubles import LateDevice, SharedMemory, one_kernel_at_a_time
from .joined import JoinedEngines
from .test_joined_engines import check, random_prompts, reference


def open_engine(path: Path, options: EngineOptions) -> Engine:
    options = replace(options, device="cuda", kernels="auto", max_batch_size=4, max_model_len=64)
    return open_device_engine(path, options, LateDevice())


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_joined_engines_on_a_device_equal_transformers(transport: str, tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path, "llama-gqa")
    prompts = random_prompts((3, 30, 33), seed=1)  # the second's answer goes on in another page
    expected = reference(path, prompts, num_new=4)
    with filled_with_nan(), one_kernel_at_a_time():
        joined = JoinedEngines(
            path,
            transport=transport,
            block_sizes=(16, 32),
            budget=24,
            num_tokens=512,
            max_batch_size=4,
            open_engine=open_engine,
            gpu=SharedMemory(),
        )
        try:
            check(joined, prompts, expected)
        finally:
            joined.close()
