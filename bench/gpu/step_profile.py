"""Tables of kernels by time, for the decode steps that have a target. In the interpreter a toy's, of
operators on the processor: those times say nothing."""

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from bench.comparison.peers.pdserve_peer import ColocatedWorker

from .engines import open_random_engine, options_for, triton_on_host
from .kernel_table import Interval, table
from .report import Note
from .sections import Context
from .serving import random_prompts
from .shapes import LLAMA_1B, LLAMA_8B, QWEN3_06B, TOY, Shape
from .throughput import TEMPERATURE, nano_requests

_WARM_UP_STEPS, _STEPS = 4, 8
_SECONDS_OF_A_MODEL = 12.0

Requests = Sequence[tuple[list[int], int, float]]  # prompt, number of new tokens, temperature


@dataclass(frozen=True)
class Step:
    """The decode step in which all of the requests have a token."""

    name: str
    requests: Callable[[], Requests]


@dataclass(frozen=True)
class ProfiledModel:
    shape: Shape
    steps: Sequence[Step]
    max_batch_tokens: int


def _alike(shape: Shape, count: int, prompt_len: int) -> Step:
    def requests() -> Requests:
        return [
            (prompt, _WARM_UP_STEPS + _STEPS + 8, 0.0) for prompt in random_prompts(shape, count, prompt_len)
        ]

    return Step(f"batch {count} at {prompt_len}", requests)


def _nano() -> Requests:
    return [(request.prompt, request.num_new_tokens, TEMPERATURE) for request in nano_requests()]


MODELS = (
    ProfiledModel(LLAMA_8B, (_alike(LLAMA_8B, 1, 128), _alike(LLAMA_8B, 64, 2048)), 8192),
    ProfiledModel(LLAMA_1B, (_alike(LLAMA_1B, 1, 128),), 2048),
    ProfiledModel(QWEN3_06B, (Step("256 requests of nano-vllm", _nano),), 16_384),
)
_TOYS = (ProfiledModel(TOY, (_alike(TOY, 2, 5),), 64),)


def measure(context: Context) -> None:
    if context.interpret:
        torch.set_num_threads(1)
        context.emit(Note("profile: kernels need a GPU; these are a toy's operators on the processor"))
    # The profiler's part in the driver must stand before graphs are captured, and stay.
    os.environ |= {"TEARDOWN_CUPTI": "0"}
    with profile(activities=_activities(context)):
        torch.ones(1, device=context.device).sum()
    for model in _TOYS if context.interpret else MODELS:
        if context.left_s < _SECONDS_OF_A_MODEL:
            context.emit(Note(f"{model.shape.name}: there was no time left for it"))
            continue
        with triton_on_host() if context.interpret else nullcontext():
            _profile(context, model)
        gc.collect()
        if not context.interpret:
            torch.cuda.empty_cache()


def _profile(context: Context, model: ProfiledModel) -> None:
    steps = [(step.name, step.requests()) for step in model.steps]
    longest = max(len(prompt) + new for _, requests in steps for prompt, new, _ in requests)
    max_batch_size = max(len(requests) for _, requests in steps)
    options = options_for(
        "cuda",
        num_tokens=max(sum(len(prompt) + new for prompt, new, _ in requests) for _, requests in steps),
        max_model_len=longest,
        max_batch_size=max_batch_size,
        max_batch_tokens=model.max_batch_tokens,
    )
    engine = open_random_engine(model.shape, options)
    for name, requests in steps:
        worker = ColocatedWorker(
            engine, max_batch_size=max_batch_size, max_batch_tokens=model.max_batch_tokens
        )
        for row in table(f"{model.shape.name}, {name}", _intervals(context, worker, requests), _STEPS):
            context.emit(row)
        if name != steps[-1][0]:  # the next one needs its blocks
            while worker.is_busy:
                worker.step()


def _intervals(context: Context, worker: ColocatedWorker, requests: Requests) -> list[Interval]:
    """The intervals of a few steps, once all requests have decoded for a while."""
    worker.submit(requests)
    while min(map(len, worker.token_ids)) < _WARM_UP_STEPS:
        worker.step()
    with profile(activities=_activities(context)) as profiler:
        for _ in range(_STEPS):
            worker.step()
        if not context.interpret:
            torch.cuda.synchronize()
    wanted = torch.profiler.DeviceType.CPU if context.interpret else torch.profiler.DeviceType.CUDA
    return [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == wanted and event.cpu_parent is None and not event.is_user_annotation
    ]


def _activities(context: Context) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU if context.interpret else ProfilerActivity.CUDA]
