"""pdserve as one of the measured engines: one worker in the role *both*, without a cluster around it.

Run from the benchmark's folder: `python -m peers.pdserve_peer --checkpoint DIR --dtype bfloat16 --threads 2`.
"""

import os
import time
from collections.abc import Sequence

from .protocol import PeerOptions, Timeline, claim_stdout, parse_options, serve

ENGINE = "pdserve"
NUM_TOKENS = 16_384


class ColocatedWorker:
    """A decode worker that serves both phases; every prompt carries a salt of its own, so that none is cached."""

    def __init__(self, options: PeerOptions) -> None:
        from pdserve.decode_worker.worker import DecodeWorker
        from pdserve.engine.engine import Engine, EngineOptions
        from pdserve.engine.outbox import Outbox
        from pdserve.engine.token_masks import NoGrammars, TokenMasks

        engine_options = EngineOptions(
            dtype=options.dtype,  # type: ignore[arg-type]
            num_blocks=NUM_TOKENS // 16,
            max_model_len=2048,
            num_threads=options.num_threads,
        )
        engine = Engine.open(options.checkpoint, engine_options)
        self.variant = engine.kernels.name
        self._outbox = Outbox("bench-0", 1)
        self._worker = DecodeWorker(
            engine.kv,
            engine.runner,
            _NoTransfers(),
            self._outbox,
            TokenMasks(NoGrammars()),
            max_batch_size=64,
            max_batch_tokens=4096,
        )
        self._num_requests = 0

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Timeline:
        from pdserve.core.messages import Serve

        start_s = time.perf_counter()
        arrivals_s: dict[str, list[float]] = {}
        for prompt in prompts:
            spec = self._spec(prompt, num_new_tokens)
            arrivals_s[spec.transfer.request_id] = []
            self._worker.serve(Serve(spec=spec))
        while self._worker.num_legs:
            self._worker.step()
            now_s = time.perf_counter()
            outputs, _, _ = self._outbox.take()
            for output in outputs:
                arrivals_s[output.transfer.request_id].append(now_s)
        return Timeline(start_s, tuple(map(tuple, arrivals_s.values())))

    def _spec(self, prompt: Sequence[int], num_new_tokens: int):  # type: ignore[no-untyped-def]
        from pdserve.core.request import SamplingParams, SequenceSpec, TransferId

        self._num_requests += 1
        name = f"bench-{self._num_requests}"
        return SequenceSpec(
            transfer=TransferId(name, 0),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True),
            cache_salt=name,
        )


class _NoTransfers:
    """A worker that serves both phases receives nothing."""

    def expect(self, *args: object) -> None:
        raise AssertionError("nothing is received here")

    cancel = expect


def main() -> None:
    options = parse_options()
    results = claim_stdout()
    os.environ |= {"OMP_NUM_THREADS": str(options.num_threads)}
    import torch

    torch.set_num_threads(options.num_threads)
    serve(ENGINE, [ColocatedWorker(options)], options, results)


if __name__ == "__main__":
    main()
