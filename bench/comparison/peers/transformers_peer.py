"""`transformers` as a peer, both of its ways: `generate` on a static batch, and its own continuous batching.

Run from the benchmark's folder: `python -m peers.transformers_peer --checkpoint DIR --dtype bfloat16
--threads 2`."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .protocol import MeasuredEngine, PeerOptions, RunTimes, claim_stdout, parse_options, serve

ENGINE = "transformers"


class GenerateEngine:
    """`model.generate`: one batch, in lockstep, on a contiguous cache."""

    variant = "generate"

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> RunTimes:
        import torch

        input_ids = torch.tensor(prompts)
        clock = _StepClock()
        start_s = time.perf_counter()
        self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
        step_times_s = tuple(clock.times_s[1:])  # the first call brings the prompt
        return RunTimes(start_s, (step_times_s,) * len(prompts))


class _StepClock:
    """Stands in for a streamer: `generate` hands it the prompt and then each step's tokens."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _tokens: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class ContinuousBatchingEngine:
    """`transformers`' continuous batching: a paged cache and a generation thread that runs as long as the
    engine."""

    variant = "continuous_batching"

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> RunTimes:
        start_s = time.perf_counter()
        inputs = [list(prompt) for prompt in prompts]
        waiting = set(
            self._manager.add_requests(inputs, max_new_tokens=num_new_tokens, record_timestamps=True)
        )
        arrivals_s: list[tuple[float, ...]] = []
        while waiting:
            output = self._manager.get_result(timeout=1)
            if output is None and not self._manager.is_running():
                raise RuntimeError("the continuous batching thread ended; standard error says why")
            if output is not None and output.error is not None:
                raise RuntimeError(f"continuous batching failed: {output.error}")
            if output is not None and output.is_finished():
                waiting.remove(output.request_id)
                arrivals_s.append(tuple(output.timestamps))
        return RunTimes(start_s, tuple(arrivals_s))


@contextmanager
def load_engines(options: PeerOptions) -> Iterator[list[MeasuredEngine]]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(options.num_threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype)
    ).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    continuous = ContinuousBatchingConfig(
        num_blocks=64,  # pages of 256 tokens; unset, it would take nine tenths of the memory
        max_batch_tokens=4096,  # all prompts of a case in one step
        max_requests_per_batch=32,
        allow_block_sharing=False,  # repeats must not find their prompts cached
    )
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(eos_token_id=-1, do_sample=False),
        continuous_batching_config=continuous,
    )
    manager.start()
    try:
        yield [GenerateEngine(model), ContinuousBatchingEngine(manager)]
    finally:
        manager.stop(block=True, timeout=10)
        manager.destroy()


def main() -> None:
    options = parse_options()
    results = claim_stdout()
    # Before torch is loaded: threads that it does not start itself take their width from here.
    os.environ |= {"OMP_NUM_THREADS": str(options.num_threads), "HF_HUB_OFFLINE": "1"}
    with load_engines(options) as engines:
        serve(ENGINE, engines, options, results)


if __name__ == "__main__":
    main()
