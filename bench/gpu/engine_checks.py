"""A whole engine in float32, token by token: beside `transformers`, by captured graphs and without them; and
as it serves, with as many blocks as fit and requests of every kind, beside the reference engine on the
processor. Then KV on its way from cache to cache."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from bench.comparison.peers.pdserve_peer import ColocatedWorker
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.on_gpu.decode_graphs import DecodeGraphs

from . import link_checks
from .cases import Case
from .checks import run_checks
from .engines import open_checkpoint_engine, triton_on_host
from .mixed_requests import answered, mixed_requests, num_differences
from .sections import Context
from .small_models import SmallModel, small_model

_MAX_BATCH_TOKENS = 64  # so that long prompts come in chunks, beside others that decode
_MEMORY_FRACTION = 0.5  # the kernels' checks run beside
_BLOCK_SIZE_OF_A_MIX = 64  # the value of `auto` on a GPU
_LONGEST_TOY_PROMPT, _TOY_BATCH_TOKENS = 5, 16
_LOGPROB_TOLERANCE = 1e-3


def check(context: Context) -> None:
    if not context.interpret:
        # Exact float32 products, as the reference's.
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1 if context.interpret else torch.get_num_threads())
    with TemporaryDirectory(prefix="pdserve-bench-") as folder, ExitStack() as stack:
        if context.interpret:
            stack.enter_context(triton_on_host())
        run_checks(context, _all_cases(Path(folder), context.interpret))


def _all_cases(folder: Path, is_toy: bool) -> Iterator[Case]:
    for name, block_size in (("llama", 16), ("qwen3", 64)):
        yield from _cases(name, small_model(name, folder, is_toy), block_size, is_toy)
    yield from link_checks.cases(is_toy)


def _cases(name: str, model: SmallModel, block_size: int, is_toy: bool) -> Iterator[Case]:
    what = f"engine, small {name} in float32, page {block_size}"
    error = partial(_num_wrong_tokens, model, block_size, is_toy)
    yield Case(
        f"{what}: tokens of transformers, decoding by captured graphs", 0.0, partial(error, by_graphs=True)
    )
    yield Case(
        f"{what}: tokens of transformers, decoding without graphs", 0.0, partial(error, by_graphs=False)
    )
    if block_size == _BLOCK_SIZE_OF_A_MIX:
        mix = partial(_num_differences_of_a_mix, model, block_size, is_toy)
        yield Case(f"{what}, as many blocks as fit: penalties, biases, log probabilities, masks", 0.0, mix)


def _num_wrong_tokens(model: SmallModel, block_size: int, is_toy: bool, *, by_graphs: bool) -> float:
    """The wrong tokens, with all prompts at once. Infinite where no step took the path under test."""
    batch_size = len(model.prompts)
    options = _options(block_size, batch_size, is_toy)
    engine = open_checkpoint_engine(model.path, options)
    worker = ColocatedWorker(engine, max_batch_size=batch_size, max_batch_tokens=_MAX_BATCH_TOKENS)
    replays: list[object] = []
    run, takes = DecodeGraphs.run, DecodeGraphs.takes

    def counted(graphs: DecodeGraphs, batch: Any) -> Any:
        replays.append(batch)
        return run(graphs, batch)

    with (
        patch.object(DecodeGraphs, "run", counted),
        patch.object(DecodeGraphs, "takes", takes if by_graphs else lambda graphs, batch: False),
    ):
        worker.run(model.prompts, len(model.continuations[0]))
    if bool(replays) != by_graphs:
        return math.inf
    pairs = zip(worker.token_ids, model.continuations, strict=True)
    return float(sum(a != b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)))


def _num_differences_of_a_mix(model: SmallModel, block_size: int, is_toy: bool) -> float:
    """The differences from the reference engine on the CPU; infinite where the engine did not take the blocks
    that fit."""
    prompts = [prompt[:_LONGEST_TOY_PROMPT] for prompt in model.prompts] if is_toy else model.prompts
    num_new_tokens = 2 if is_toy else len(model.continuations[0])
    options = _options(block_size, 4 if is_toy else 16, is_toy)
    if is_toy:
        options = replace(options, max_model_len=_TOY_BATCH_TOKENS, max_batch_tokens=_TOY_BATCH_TOKENS)
    measured = open_checkpoint_engine(
        model.path, replace(options, num_blocks=None, memory_fraction=_MEMORY_FRACTION)
    )
    assert options.num_blocks is not None
    if measured.cache.num_blocks <= options.num_blocks:
        return math.inf
    reference = Engine.open(model.path, replace(options, device="cpu", kernels="torch"))
    specs = mixed_requests(prompts, num_new_tokens, measured.config.vocab_size)
    sizes = {"max_batch_size": options.max_batch_size, "max_batch_tokens": options.max_batch_tokens}
    ours, theirs = (answered(engine, specs, **sizes) for engine in (measured, reference))
    return num_differences(ours, theirs, _LOGPROB_TOLERANCE)


def _options(block_size: int, max_batch_size: int, is_toy: bool) -> EngineOptions:
    return EngineOptions(
        dtype="float32",
        device="cuda",
        block_size=block_size,
        num_blocks=2048 // block_size,
        max_model_len=64 if is_toy else 512,
        max_batch_size=max_batch_size,
        max_batch_tokens=_MAX_BATCH_TOKENS,
    )
