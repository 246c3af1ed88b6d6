"""A whole engine in float32 beside `transformers`, token by token; by captured graphs, and without them."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from peers.pdserve_peer import ColocatedWorker

from pdserve.engine.engine import EngineOptions
from pdserve.engine.on_gpu.decode_graphs import DecodeGraphs

from .cases import Case
from .engines import open_checkpoint_engine, triton_on_host
from .kernel_checks import checked
from .sections import Context
from .small_models import SmallModel, small_model

_MAX_BATCH_TOKENS = 64  # so that long prompts come in chunks, beside others that decode


def check(context: Context) -> None:
    if not context.interpret:
        # Exact float32 products, as the reference's.
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1 if context.interpret else torch.get_num_threads())
    with TemporaryDirectory(prefix="pdserve-bench-") as folder, ExitStack() as stack:
        if context.interpret:
            stack.enter_context(triton_on_host())
        for name, block_size in (("llama", 16), ("qwen3", 64)):
            model = small_model(name, Path(folder), context.interpret)
            for case in _cases(name, model, block_size, context.interpret):
                context.emit(checked(case))


def _cases(name: str, model: SmallModel, block_size: int, is_toy: bool) -> Iterator[Case]:
    what = f"engine, small {name} in float32, page {block_size}"
    error = partial(_num_wrong_tokens, model, block_size, is_toy)
    yield Case(f"{what}: tokens of transformers, decoding by captured graphs", 0.0, partial(error, by_graphs=True))
    yield Case(f"{what}: tokens of transformers, decoding without graphs", 0.0, partial(error, by_graphs=False))


def _num_wrong_tokens(model: SmallModel, block_size: int, is_toy: bool, *, by_graphs: bool) -> float:
    """All prompts at once. Infinite where no step went the way that is looked at."""
    batch_size = len(model.prompts)
    options = EngineOptions(
        dtype="float32",
        device="cuda",
        block_size=block_size,
        num_blocks=2048 // block_size,
        max_model_len=128 if is_toy else 512,
        max_batch_size=batch_size,
        max_batch_tokens=_MAX_BATCH_TOKENS,
    )
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
