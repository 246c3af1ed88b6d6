"""pdserve as one of the measured engines: one worker in the role *both*, without a cluster around it.

Run from the benchmark's folder: `python -m peers.pdserve_peer --checkpoint DIR --dtype bfloat16 --threads 2`.
"""

import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .protocol import PeerOptions, RunTimes, claim_stdout, parse_options, serve

if TYPE_CHECKING:  # torch is imported when the number of threads is set
    from pdserve.core.request import SequenceSpec
    from pdserve.engine.engine import Engine

ENGINE = "pdserve"
NUM_TOKENS = 16_384


class ColocatedWorker:
    """A decode worker that serves both phases; every prompt carries a salt of its own, so that none is
    cached."""

    def __init__(self, engine: "Engine", *, max_batch_size: int = 64, max_batch_tokens: int = 4096) -> None:
        from pdserve.decode_worker.worker import DecodeWorker
        from pdserve.engine.batch import RoleEngine
        from pdserve.engine.outbox import Outbox
        from pdserve.engine.token_masks import NoGrammars, TokenMasks

        self.variant = engine.kernels.name
        self._outbox = Outbox("bench-0", 1)
        self._worker = DecodeWorker(
            RoleEngine(engine.kv, engine.runner, engine.config.num_layers, max_batch_tokens, max_batch_size),
            NoTransfers(),
            self._outbox,
            TokenMasks(NoGrammars()),
            lambda sequences: None,
        )
        self._num_requests = 0
        self._arrivals_s: dict[str, list[float]] = {}
        self._token_ids: dict[str, list[int]] = {}

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> RunTimes:
        return self.serve((prompt, num_new_tokens, 0.0) for prompt in prompts)

    def serve(self, requests: Iterable[tuple[Sequence[int], int, float]]) -> RunTimes:
        """(prompt, number of new tokens, temperature) of each; all are submitted at once."""
        start_s = time.perf_counter()
        self.submit(requests)
        while self.is_busy:
            self.step()
        return RunTimes(start_s, tuple(map(tuple, self._arrivals_s.values())))

    def submit(self, requests: Iterable[tuple[Sequence[int], int, float]]) -> None:
        """Submits requests as `serve` does and forgets earlier ones. `step` computes them."""
        from pdserve.core.messages import Serve

        self._arrivals_s, self._token_ids = {}, {}
        for request in requests:
            spec = self._spec(*request)
            self._arrivals_s[spec.transfer.request_id], self._token_ids[spec.transfer.request_id] = [], []
            self._worker.serve(Serve(spec=spec))

    @property
    def is_busy(self) -> bool:
        return self._worker.num_legs > 0

    def step(self) -> None:
        self._worker.step()
        now_s = time.perf_counter()
        outputs, ended, _ = self._outbox.take()
        for output in outputs:
            self._arrivals_s[output.transfer.request_id].append(now_s)
            self._token_ids[output.transfer.request_id].append(output.token_id)
        for leg in ended:
            if leg.error is not None:
                raise RuntimeError(f"{leg.transfer}: {leg.error}")

    @property
    def token_ids(self) -> list[list[int]]:
        """The output so far of each of the last requests."""
        return list(self._token_ids.values())

    def _spec(self, prompt: Sequence[int], num_new_tokens: int, temperature: float) -> "SequenceSpec":
        from pdserve.core.request import SamplingParams, SequenceSpec, TransferId

        self._num_requests += 1
        name = f"bench-{self._num_requests}"
        return SequenceSpec(
            transfer=TransferId(name, 0),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=num_new_tokens, temperature=temperature, ignore_eos=True, seed=self._num_requests
            ),
            cache_salt=name,
        )


class NoTransfers:
    """A worker that serves both phases receives nothing."""

    def expect(self, *args: object) -> None:
        raise AssertionError("nothing is received here")

    cancel = expect


def open_engine(options: PeerOptions) -> "Engine":
    from pdserve.engine.engine import Engine, EngineOptions

    engine_options = EngineOptions(
        dtype=options.dtype,  # type: ignore[arg-type]
        num_blocks=NUM_TOKENS // 16,
        max_model_len=2048,
        num_threads=options.num_threads,
        kernels=options.kernels,  # type: ignore[arg-type]
    )
    return Engine.open(options.checkpoint, engine_options)


def main() -> None:
    options = parse_options()
    results = claim_stdout()
    os.environ |= {"OMP_NUM_THREADS": str(options.num_threads)}
    import torch

    torch.set_num_threads(options.num_threads)
    serve(ENGINE, [ColocatedWorker(open_engine(options))], options, results)


if __name__ == "__main__":
    main()
