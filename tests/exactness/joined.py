"""A prefill engine and a decode engine in one process, joined by a real link: a cluster's data path without
the cluster."""

import queue
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from pdserve.core.failures import FailureKind
from pdserve.core.messages import Prefill, Reserve, TokenOutput, TransferStats
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.decode_worker.worker import DecodeWorker
from pdserve.engine.batch import RoleEngine
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.outbox import Outbox
from pdserve.engine.token_masks import NoGrammars, TokenMasks
from pdserve.grammar.messages import GrammarSetup
from pdserve.grammar.thread import GrammarThread
from pdserve.kv_transfer.config import Membership
from pdserve.kv_transfer.endpoint import TransferEndpoint
from pdserve.kv_transfer.interfaces import Gpu
from pdserve.prefill_worker.worker import PrefillWorker

from ..kv_transfer.support import CALM

TOKEN = "a secret of this test"


class Listener:
    """Carries a transfer's ending from the endpoint's thread to the test's."""

    def __init__(self, inbox: "queue.SimpleQueue[Callable[[], None]]", joined: "JoinedEngines") -> None:
        self._inbox, self._joined = inbox, joined

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._inbox.put(lambda: self._joined.decode.received(transfer, payload))

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._inbox.put(lambda: self._joined.decode.receive_failed(transfer, error, kind))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._inbox.put(lambda: self._joined.prefill.sent(transfer, stats))

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._inbox.put(lambda: self._joined.prefill.send_failed(transfer, error, kind))


class MaskListener:
    """Carries a mask from the grammar thread to the test's."""

    def __init__(
        self, inbox: "queue.SimpleQueue[Callable[[], None]]", masks: Callable[[], TokenMasks]
    ) -> None:
        self._inbox, self._masks = inbox, masks

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._inbox.put(lambda: self._masks().masked(key, num_tokens, bits))

    def on_refused(self, key: int, why: str) -> None:
        raise AssertionError(why)

    def on_failed(self, key: int, why: str) -> None:
        raise AssertionError(why)


class JoinedEngines:
    """Runs both workers' roles on the calling thread, and the transfers on threads of their own."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        transport: str = "shm",
        block_sizes: tuple[int, int] = (16, 16),
        budget: int = 4096,
        num_tokens: int = 8192,
        max_batch_size: int = 64,
        kernels: str = "auto",
        dtype: str = "float32",
        set_up: Callable[[], GrammarSetup] | None = None,
        open_engine: Callable[[Path, EngineOptions], Engine] = Engine.open,
        gpu: Gpu | None = None,
    ) -> None:
        """`set_up`: of the grammar processes, where requests follow grammars. `gpu`: that holds the engines'
        caches."""
        self.engines = [
            open_engine(
                checkpoint,
                EngineOptions(
                    dtype=dtype,  # type: ignore[arg-type]
                    block_size=size,
                    num_blocks=num_tokens // size,
                    max_model_len=4096,
                    kernels=kernels,  # type: ignore[arg-type]
                ),
            )
            for size in block_sizes
        ]
        p, d = self.engines
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        listener = Listener(self._inbox, self)
        # chunks are small, so that small models send many
        config = replace(CALM, chunk_bytes=1 << 16, heartbeat_s=0.5)
        self._ends = [
            TransferEndpoint(
                engine.cache,
                listener,
                Membership(name, 1, TOKEN, "127.0.0.1"),
                transport=transport,
                config=config,
                gpu=gpu,
            )
            for engine, name in ((p, "prefill-0"), (d, "decode-0"))
        ]
        _, self._address = [end.start() for end in self._ends]
        self.p_box, self.d_box = Outbox("prefill-0", 1), Outbox("decode-0", 1)
        self._grammars = [] if set_up is None else [self._grammar_thread(set_up, index) for index in range(2)]
        self.masks = [TokenMasks(port) for port in self._grammars or (NoGrammars(), NoGrammars())]
        self.prefill = PrefillWorker(
            RoleEngine(p.kv, p.runner, p.layout.num_layers, budget, max_batch_size),
            self._ends[0],
            self.p_box,
            self.masks[0],
        )
        self.decode = DecodeWorker(
            RoleEngine(d.kv, d.runner, d.layout.num_layers, max(budget, 64), max_batch_size),
            self._ends[1],
            self.d_box,
            self.masks[1],
            lambda sequences: None,
        )
        self._num_requests = 0

    def close(self) -> None:
        """Checks that both pools are whole again, then ends everything."""
        try:
            for engine in self.engines:
                engine.pool.check_integrity()
                assert engine.pool.num_free_blocks == engine.pool.num_blocks
        finally:
            for end in self._ends:
                end.close()
            for thread in self._grammars:
                thread.stop()

    def _grammar_thread(self, set_up: Callable[[], GrammarSetup], index: int) -> GrammarThread:
        return GrammarThread(set_up, MaskListener(self._inbox, lambda: self.masks[index]))

    def submit(
        self,
        prompt: Iterable[int],
        sampling: SamplingParams,
        output: Iterable[int] = (),
        eos: tuple[int, ...] | None = None,
    ) -> SequenceSpec:
        """`output`: what an earlier attempt has produced; `eos`: by default the checkpoint's."""
        self._num_requests += 1
        spec = SequenceSpec(
            transfer=TransferId(f"r{self._num_requests}", 0),
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            choices=tuple(range(sampling.n)),
            output_token_ids=tuple(output),
            eos_token_ids=self.engines[0].config.eos_token_ids if eos is None else eos,
        )
        needs_decode = spec.sampling.max_tokens - len(spec.output_token_ids) > 1
        if needs_decode:
            self.decode.reserve(Reserve(spec=spec, source_worker_id="prefill-0", source_incarnation=1))
        self.prefill.prefill(Prefill(spec=spec, target=self._address if needs_decode else None))
        return spec

    def run(self) -> None:
        """Runs until both legs of every request have ended."""
        while self.prefill.num_legs or self.decode.num_legs:
            worked = self.prefill.step()
            worked = self.decode.step() or worked
            if not worked:
                self._inbox.get(timeout=60.0)()
            while not self._inbox.empty():
                self._inbox.get()()
        errors = [leg.error for leg in (*self.p_box.ended, *self.d_box.ended) if leg.error is not None]
        assert not errors, errors

    def generate(
        self, prompts: Iterable[Iterable[int]], sampling: SamplingParams, output: Iterable[int] = ()
    ) -> list[list[TokenOutput]]:
        """Every request at once; the tokens of all choices of each, by (choice, index)."""
        specs = [self.submit(prompt, sampling, output) for prompt in prompts]
        self.run()
        return [self.outputs_of(spec) for spec in specs]

    def outputs_of(self, spec: SequenceSpec) -> list[TokenOutput]:
        """The tokens of all choices of a request, by (choice, index). The decode worker repeats the first
        token."""
        outputs = [
            output
            for output in (*self.p_box.outputs, *self.d_box.outputs)
            if output.transfer == spec.transfer
        ]
        return [
            output
            for _, output in sorted({(output.choice, output.index): output for output in outputs}.items())
        ]
