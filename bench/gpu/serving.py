"""Decode steps and prefill of a whole engine, scheduler and sampler included, beside the least that this GPU
needs for them."""

import random
import statistics
from itertools import pairwise

from bench.comparison.peers.pdserve_peer import ColocatedWorker
from bench.comparison.peers.protocol import RunTimes

from .engines import open_random_engine, options_for
from .limits import COPY, PRODUCT
from .report import at_least
from .sections import Context
from .shapes import LLAMA_1B, LLAMA_8B, Shape

_NEW_TOKENS = 96
_MIN_STEPS = 16  # that a median is taken of
_SHORT_PROMPT, _CONTEXT, _LONG_PROMPT = 128, 2048, 8192
_REPEATS = 3


def measure_8b(context: Context) -> None:
    measure_shape(context, LLAMA_8B, least=0.8, batch_size=64, long_prompt=_LONG_PROMPT)


def measure_1b(context: Context) -> None:
    measure_shape(context, LLAMA_1B, least=0.6, batch_size=64, long_prompt=None)


def measure_shape(
    context: Context, shape: Shape, *, least: float, batch_size: int, long_prompt: int | None
) -> None:
    """One decode step of one sequence and of a batch, and one prompt where `long_prompt` says so."""
    options = options_for(
        context.device,
        num_tokens=batch_size * (_CONTEXT + _NEW_TOKENS) + (long_prompt or 0),
        max_model_len=max(long_prompt or 0, _CONTEXT) + _NEW_TOKENS,
        max_batch_size=batch_size,
        max_batch_tokens=long_prompt or _CONTEXT,
    )
    engine = open_random_engine(shape, options)
    worker = ColocatedWorker(engine, max_batch_size=batch_size, max_batch_tokens=options.max_batch_tokens)
    _measure_steps(context, shape, worker, 1, _SHORT_PROMPT, least)
    if long_prompt is not None:
        _measure_prefill(context, shape, worker, long_prompt)
    _measure_steps(context, shape, worker, batch_size, _CONTEXT, least)


def _measure_steps(
    context: Context, shape: Shape, worker: ColocatedWorker, batch_size: int, prompt_len: int, least: float
) -> None:
    timeline = worker.run(random_prompts(shape, batch_size, prompt_len), _NEW_TOKENS)
    step_s, mean_output_len = steady_step(timeline)
    num_bytes = shape.step_bytes(batch_size * (prompt_len + round(mean_output_len)))
    share = context.share(COPY, num_bytes / step_s)
    what = f"decode step, {shape.name}, batch {batch_size} at {prompt_len}"
    context.emit(at_least(what, f"{step_s * 1e3:.2f} ms", share, least, "weights + KV / copy"))


def _measure_prefill(context: Context, shape: Shape, worker: ColocatedWorker, prompt_len: int) -> None:
    times_s = []
    for _ in range(_REPEATS + 1):
        timeline = worker.run(random_prompts(shape, 1, prompt_len), 1)
        times_s.append(timeline.arrivals_s[0][0] - timeline.start_s)
    prefill_s = statistics.median(times_s[1:])
    share = context.share(PRODUCT, shape.prefill_flops(prompt_len) / prefill_s)
    what = f"prefill, {shape.name}, {prompt_len} tokens"
    context.emit(at_least(what, f"{prefill_s * 1e3:.1f} ms", share, 0.65, "matrix product"))


def steady_step(timeline: RunTimes) -> tuple[float, float]:
    """(median time of a step, mean output tokens of a sequence by then), of the later half of the steps with
    all sequences."""
    opened_s = max(times[0] for times in timeline.arrivals_s)
    closed_s = min(times[-1] for times in timeline.arrivals_s)
    steps_s = sorted(
        {time_s for times in timeline.arrivals_s for time_s in times if opened_s <= time_s <= closed_s}
    )
    steps_s = steps_s[len(steps_s) // 2 :]  # before, memory is still being touched for the first time
    if len(steps_s) <= _MIN_STEPS:
        raise ValueError(f"{len(steps_s)} steps with all sequences, expected more than {_MIN_STEPS}")
    middle_s = steps_s[len(steps_s) // 2]
    lengths = [sum(time_s <= middle_s for time_s in times) for times in timeline.arrivals_s]
    gaps_s = [later - earlier for earlier, later in pairwise(steps_s)]
    return statistics.median(gaps_s), statistics.fmean(lengths)


def random_prompts(shape: Shape, count: int, length: int) -> list[list[int]]:
    return [[random.randrange(shape.config.vocab_size) for _ in range(length)] for _ in range(count)]
