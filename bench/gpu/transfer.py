"""One prefill and one decode worker (1P1D) as two processes on one GPU: how much of the KV's way does the
prefill not hide?

The prefill side is a whole engine and a prefill worker, the decode side the cache and the endpoint of one.
Both processes' transfers go through the real endpoints."""

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from pdserve.core.messages import Prefill, TransferAddress, TransferStats
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import RoleEngine
from pdserve.engine.device import Device
from pdserve.engine.engine import EngineOptions
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.outbox import Outbox
from pdserve.engine.token_masks import NoGrammars, TokenMasks
from pdserve.kernels import KernelRequirements, load_kernels
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint
from pdserve.prefill_worker.worker import PrefillWorker

from ..transfer_endings import Endings
from .engines import BLOCK_SIZE, device_of, layout_of, open_random_engine
from .report import Check, Row
from .sections import Context
from .shapes import LLAMA_8B, Shape

_PROMPT_LEN = 8192
_MAX_BATCH_TOKENS = 2048
_REPEATS = 5
_MOST_EXPOSED = 0.05  # share of TTFT


def measure(context: Context) -> None:
    measure_shape(context, LLAMA_8B, "cuda_ipc", _PROMPT_LEN, [TransferConfig()])


def measure_shape(
    context: Context, shape: Shape, transport: str, prompt_len: int, configs: Sequence[TransferConfig]
) -> None:
    """One prompt after the other by each of `configs`. A prompt fills either cache, so that the caches can be
    compared as a whole."""
    options = EngineOptions(
        device="cuda" if context.device == "cuda" else "cpu",
        block_size=BLOCK_SIZE,
        num_blocks=prompt_len // BLOCK_SIZE,
        max_model_len=prompt_len + BLOCK_SIZE,
        max_batch_size=1,
        max_batch_tokens=_MAX_BATCH_TOKENS,
    )
    spawning = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    pipe, child_pipe = spawning.Pipe()
    child = spawning.Process(
        target=decode_side, args=(child_pipe, shape, options, transport, prompt_len), daemon=True
    )
    child.start()
    child_pipe.close()
    try:
        pair = _Pair(shape, options, transport, prompt_len, pipe)
        for config in configs:
            pair.measure(context, config)
    finally:
        pipe.close()  # which ends it
        child.join(30.0)


class _Pair:
    """The prefill side, and the decode side at the other end of `pipe`."""

    def __init__(
        self,
        shape: Shape,
        options: EngineOptions,
        transport: str,
        prompt_len: int,
        pipe: "Connection[Any, Any]",
    ) -> None:
        self._shape, self._options, self._transport, self._prompt_len, self._pipe = (
            shape,
            options,
            transport,
            prompt_len,
            pipe,
        )
        self._engine = open_random_engine(shape, options)
        self._numbers = count()

    def measure(self, context: Context, config: TransferConfig) -> None:
        """The first of the prompts compiles and connects."""
        endings, outbox, engine = Endings(), Outbox("p", 1), self._engine
        endpoint = endpoint_of("p", engine.cache, endings, self._transport, device_of(self._options), config)
        endpoint.start()
        worker = PrefillWorker(
            RoleEngine(engine.kv, engine.runner, engine.config.num_layers, _MAX_BATCH_TOKENS, 1),
            endpoint,
            outbox,
            TokenMasks(NoGrammars()),
        )
        self._pipe.send(config)
        address: TransferAddress = self._pipe.recv()
        times_s, all_stats = [], []
        for number in islice(self._numbers, _REPEATS + 1):
            self._pipe.send(number)
            self._pipe.recv()
            ttft_s, stats = _prefill(
                worker, outbox, endings, _spec(self._shape, number, self._prompt_len), address
            )
            self._pipe.recv()
            times_s.append(ttft_s)
            all_stats.append(stats)
        self._pipe.send("digest")
        there, here = self._pipe.recv(), _digest(engine.cache, engine.config.num_layers)
        endpoint.close()
        self._tell(context, config, there == here, times_s[1:], all_stats[1:])

    def _tell(
        self,
        context: Context,
        config: TransferConfig,
        is_same: bool,
        times_s: list[float],
        all_stats: list[TransferStats],
    ) -> None:
        chunks = "" if config.chunk_bytes is None else f", chunks of {config.chunk_bytes / 2**20:g} MiB"
        name = (
            f"KV of {self._prompt_len} tokens over {self._transport}{chunks}: what arrived is what was sent"
        )
        context.emit(Check(name, float(not is_same), 0.0))
        ttft_s, exposed_s = (
            statistics.median(times_s),
            statistics.median(stats.exposed_s for stats in all_stats),
        )
        hidden = sum(stats.hidden_bytes for stats in all_stats) / sum(stats.num_bytes for stats in all_stats)
        what = f"KV transfer 1P1D, {self._shape.name}, {self._prompt_len} tokens{chunks}, exposed"
        share, target = exposed_s / ttft_s, f"<= {_MOST_EXPOSED:.0%} of TTFT"
        context.emit(Row(what, f"{exposed_s * 1e3:.2f} ms", f"{share:.1%}", target, share <= _MOST_EXPOSED))
        gigabytes = all_stats[0].num_bytes / 1e9
        context.emit(Row(f"  TTFT; {gigabytes:.2f} GB, {hidden:.1%} of it hidden", f"{ttft_s * 1e3:.1f} ms"))
        per_s = statistics.median(stats.num_bytes / stats.duration_s for stats in all_stats)
        context.emit(Row("  from the first chunk to the commit", f"{per_s / 1e9:.1f} GB/s"))


def _prefill(
    worker: PrefillWorker, outbox: Outbox, endings: Endings, spec: SequenceSpec, target: TransferAddress
) -> tuple[float, TransferStats]:
    """(time to the first token, the transfer's account)."""
    start_s = time.perf_counter()
    worker.prefill(Prefill(spec=spec, target=target))
    while not outbox.outputs:
        worker.step()
    ttft_s = time.perf_counter() - start_s
    stats = endings.wait()
    assert stats is not None, "a sender's transfer was received"
    worker.sent(spec.transfer, stats)
    outbox.take()
    return ttft_s, stats


def _spec(shape: Shape, number: int, prompt_len: int) -> SequenceSpec:
    generator = torch.Generator().manual_seed(number)
    return SequenceSpec(
        transfer=TransferId("bench", number),
        prompt_token_ids=tuple(
            torch.randint(shape.config.vocab_size, (prompt_len,), generator=generator).tolist()
        ),
        sampling=SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True),
    )


def decode_side(
    pipe: "Connection[Any, Any]", shape: Shape, options: EngineOptions, transport: str, prompt_len: int
) -> None:
    """Expects what the other process announces, until that closes the pipe."""
    device, layout = device_of(options), layout_of(shape, options)
    requirements = KernelRequirements(getattr(torch, layout.dtype), layout.head_dim, layout.block_size)
    assert options.num_blocks is not None
    cache = KVCache(layout, options.num_blocks, load_kernels(options.device, requirements, "auto", 1), device)
    endings = Endings()
    endpoint: TransferEndpoint | None = None
    block_ids = tuple(torch.randperm(options.num_blocks).tolist())
    with suppress(EOFError):
        while True:
            asked = pipe.recv()
            if asked == "digest":
                pipe.send(_digest(cache, layout.num_layers))
                continue
            if isinstance(asked, TransferConfig):
                if endpoint is not None:
                    endpoint.close()
                endpoint = endpoint_of("d", cache, endings, transport, device, asked)
                pipe.send(endpoint.start())
                continue
            assert endpoint is not None, "a prompt comes before its endpoint"
            endpoint.expect(TransferId("bench", asked), ("p", 1), block_ids, prompt_len)
            pipe.send("ready")
            endings.wait()
            pipe.send("done")
    if endpoint is not None:
        endpoint.close()


def endpoint_of(
    name: str, cache: KVCache, endings: Endings, transport: str, device: Device, config: TransferConfig
) -> TransferEndpoint:
    options: dict[str, Any] = {"config": config}
    if device.torch_device.type == "cuda":
        from pdserve.kv_transfer.cuda_memory import CudaGpu

        options["gpu"] = CudaGpu(device.torch_device)
    return TransferEndpoint(
        cache,
        endings,
        Membership(name, 1, "bench", "127.0.0.1"),
        transport=transport,
        **options,
    )


def _digest(cache: KVCache, num_layers: int) -> int:
    """The digest of all its bytes, independent of the blocks that hold them."""
    parts = (part.view(torch.int16) for layer in range(num_layers) for part in cache.layer(layer))
    return sum((index + 1) * int(part.sum(dtype=torch.int64)) for index, part in enumerate(parts))
