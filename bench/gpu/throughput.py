"""nano-vllm's benchmark (its bench.py: 256 requests at once, prompts and outputs of random lengths, seed 0),
and a part of it on `transformers`' continuous batching in the same process."""

import gc
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from bench.comparison.peers.pdserve_peer import ColocatedWorker
from bench.comparison.peers.protocol import RunTimes

from .engines import open_random_engine, options_for
from .report import Note, Row, times_at_least
from .sections import Context
from .shapes import QWEN3_06B, Shape

_WANTED_PER_S = 24_000
_MAX_BATCH_TOKENS = 16_384  # nano-vllm's
TEMPERATURE = 0.6  # nano-vllm's
_PAGE = 256  # page size of transformers' cache
_RESERVE_S = 3.0


@dataclass(frozen=True)
class BenchRequest:
    prompt: list[int]
    num_new_tokens: int


def nano_requests(
    count: int = 256, shortest: int = 100, longest: int = 1024, vocab_size: int = 10_001
) -> list[BenchRequest]:
    """The very ones of nano-vllm's bench.py by default: 133,966 output tokens."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, vocab_size - 1) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]
    return [BenchRequest(prompt, rng.randint(shortest, longest)) for prompt in prompts]


def measure(context: Context) -> None:
    measure_shape(context, QWEN3_06B, nano_requests(), num_peer_requests=64)


def measure_shape(
    context: Context, shape: Shape, requests: list[BenchRequest], num_peer_requests: int
) -> None:
    """Ours with all requests, and with those that the peer gets; then the peer."""
    part = requests[:num_peer_requests]
    ours_per_s = _measure_ours(context, shape, requests, part)
    if not context.has_peers:
        return
    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
    _measure_transformers(context, shape, part, ours_per_s)


def _measure_ours(
    context: Context, shape: Shape, requests: list[BenchRequest], part: list[BenchRequest]
) -> float:
    """Returns output tokens/s of `part`."""
    longest = max(len(request.prompt) + request.num_new_tokens for request in requests)
    options = options_for(
        context.device,
        num_tokens=sum(len(request.prompt) + request.num_new_tokens for request in requests),
        max_model_len=longest,
        max_batch_size=len(requests),
        max_batch_tokens=_MAX_BATCH_TOKENS,
    )
    engine = open_random_engine(shape, options)
    worker = ColocatedWorker(engine, max_batch_size=len(requests), max_batch_tokens=_MAX_BATCH_TOKENS)
    first_per_s = _output_per_s(_served(worker, requests))
    per_s = _output_per_s(_served(worker, requests))
    what = f"{shape.name}, {len(requests)} requests at once (nano-vllm)"
    target = f">= {_WANTED_PER_S:,} tokens/s"
    context.emit(
        Row(what, f"{per_s:,.0f} tokens/s", f"{per_s / _WANTED_PER_S:.2f}x", target, per_s >= _WANTED_PER_S)
    )
    context.emit(Note(f"{what}: {first_per_s:,.0f} tokens/s in the first round, which compiles"))
    return _output_per_s(_served(worker, part))


def _served(worker: ColocatedWorker, requests: list[BenchRequest]) -> RunTimes:
    return worker.serve((request.prompt, request.num_new_tokens, TEMPERATURE) for request in requests)


def _output_per_s(timeline: RunTimes) -> float:
    arrivals_s = timeline.arrivals_s
    return sum(map(len, arrivals_s)) / (max(times[-1] for times in arrivals_s) - timeline.start_s)


def _measure_transformers(
    context: Context, shape: Shape, requests: list[BenchRequest], ours_per_s: float
) -> None:
    """Greedily, which is less work than ours. Where time runs out before all have ended, its figure is what
    it would be had they ended then: more than it is."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    from transformers import ContinuousBatchingConfig, GenerationConfig

    batching = ContinuousBatchingConfig(
        num_blocks=sum(
            -(-(len(request.prompt) + request.num_new_tokens) // _PAGE) + 1 for request in requests
        ),
        max_batch_tokens=8192,
        max_requests_per_batch=len(requests),
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False)
    with _random_model(shape, context.device).continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=batching, timeout=_RESERVE_S
    ) as manager:
        _continue(manager, [BenchRequest(request.prompt, 8) for request in requests], context)
        start_s = time.perf_counter()
        _continue(manager, requests, context)
        duration_s = time.perf_counter() - start_s
        theirs_per_s = sum(request.num_new_tokens for request in requests) / duration_s
        what = f"{shape.name}, {len(requests)} of these requests"
        context.emit(Row(f"{what}: transformers", f"{theirs_per_s:,.0f} tokens/s"))
        ratio = ours_per_s / theirs_per_s
        context.emit(times_at_least(f"{what}: ours", f"{ours_per_s:,.0f} tokens/s", ratio, 3, "transformers"))


def _continue(manager: Any, requests: list[BenchRequest], context: Context) -> None:
    """Continues until all have ended, or little time is left."""
    waiting = {
        manager.add_request(list(request.prompt), max_new_tokens=request.num_new_tokens)
        for request in requests
    }
    while waiting:
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            raise RuntimeError("the continuous batching thread ended; standard error says why")
        if output is not None and output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output.error}")
        if output is not None and output.is_finished():
            waiting.remove(output.request_id)
        if context.left_s < _RESERVE_S:
            context.emit(
                Note(
                    f"transformers: {len(waiting)} of {len(requests)} requests had not ended when time"
                    " ran out"
                )
            )
            return


def _random_model(shape: Shape, device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    kinds = {"LlamaForCausalLM": LlamaConfig, "Qwen3ForCausalLM": Qwen3Config}
    options = {name: value for name, value in shape.options.items() if name not in ("architectures", "dtype")}
    with torch.device(device):
        config = kinds[shape.config.architecture](**options)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
