"""The cost of grammar-constrained output to a decode worker: the same batch unconstrained and constrained,
alternating.

    python -m bench.microbench.constraints

One worker of the 110M shape on this process's threads, driven as a worker process drives it, with a grammar
process beside it. The tokenizer is the embedded model's. All outputs are sampled at temperature 1, so that
both kinds take the sampler's long way."""

import argparse
import json
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bench.models import LLAMA_110M, ensure_checkpoint
from pdserve.core.messages import Serve
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.embedded import MODEL_DIR
from pdserve.engine.batch import RoleEngine
from pdserve.engine.checkpoint import open_checkpoint
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.sequence import Sequence as SequenceState
from pdserve.grammar.messages import GrammarSetup
from pdserve.grammar.sources import json_schema_grammar
from pdserve.grammar.thread import GrammarThread
from pdserve.grammar.vocabulary import tokenizer_json
from pdserve.worker.process import MASK_WAIT_S
from pdserve.worker.worker import Worker

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "kind": {"enum": ["file", "folder", "link"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
GRAMMAR = json_schema_grammar(json.dumps({"type": "array", "items": ITEM, "minItems": 1000}))


class Bench:
    """A worker on the calling thread."""

    def __init__(self, checkpoint: Path) -> None:
        engine = Engine.open(checkpoint, EngineOptions(num_blocks=2048, max_model_len=2048))
        vocab_size, ends = engine.config.vocab_size, open_checkpoint(MODEL_DIR).config.eos_token_ids
        self._masks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._grammars = GrammarThread(
            lambda: GrammarSetup(tokenizer_json(MODEL_DIR), vocab_size, ends), self
        )
        self._worker = Worker(
            "w",
            1,
            RoleEngine(engine.kv, engine.runner, engine.layout.num_layers, 2048, 64),
            None,  # type: ignore[arg-type]
            self._grammars,
            self._await_masks,
        )
        self._num_runs = 0

    def close(self) -> None:
        self._grammars.stop()

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._masks.put(lambda: self._worker.masked(key, num_tokens, bits))

    def on_refused(self, key: int, why: str) -> None:
        raise AssertionError(why)

    def on_failed(self, key: int, why: str) -> None:
        raise AssertionError(why)

    def tokens_per_s(self, batch_size: int, num_tokens: int, grammar: str) -> float:
        """The throughput of a batch after its prefill; its sequences end together unless one sits out."""
        self._num_runs += 1
        for index in range(batch_size):
            params = SamplingParams(
                max_tokens=num_tokens, seed=index, grammar=grammar, ignore_eos=not grammar
            )
            prompt = tuple((7 * i + index) % 4000 for i in range(16))
            name = f"{self._num_runs}-{index}"
            self._worker.handle(
                Serve(
                    spec=SequenceSpec(transfer=TransferId(name, 0), prompt_token_ids=prompt, sampling=params)
                )
            )
        num_emitted, started_s = 0, 0.0
        while self._worker.num_legs:
            self._take_masks(wait=not self._worker.step())
            reports = [message for message in self._worker.take_messages() if hasattr(message, "outputs")]
            num_emitted += sum(len(report.outputs) for report in reports)
            if not started_s and num_emitted >= batch_size:
                started_s, num_emitted = time.perf_counter(), 0
        return num_emitted / (time.perf_counter() - started_s)

    def _take_masks(self, wait: bool) -> None:
        if wait and self._worker.num_legs:
            self._masks.get()()
        while not self._masks.empty():
            self._masks.get()()

    def _await_masks(self, sequences: Sequence[SequenceState]) -> None:
        give_up_s = time.monotonic() + MASK_WAIT_S
        with suppress(queue.Empty):
            while not all(seq.may_sample for seq in sequences):
                self._masks.get(timeout=max(0.0, give_up_s - time.monotonic()))()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        bench = Bench(ensure_checkpoint(LLAMA_110M, "bfloat16", Path(folder) / "checkpoint"))
        print(f"{'batch':>5} {'free':>10} {'constrained':>12} tokens/s {'ratio':>8}")
        for batch_size in (1, 8, 32):
            bench.tokens_per_s(batch_size, 8, GRAMMAR)
            rounds = [
                [bench.tokens_per_s(batch_size, args.tokens, grammar) for grammar in ("", GRAMMAR)]
                for _ in range(args.rounds)
            ]
            free, bound = (statistics.median(side) for side in zip(*rounds, strict=True))
            ratios = sorted(bound / free for free, bound in rounds)
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{batch_size:5} {free:10.1f} {bound:12.1f} {'':8} {spread:>8}", flush=True)
        bench.close()


if __name__ == "__main__":
    main()
