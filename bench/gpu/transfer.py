"""One prefill and one decode worker (1P1D) as two processes on one GPU: how much of the KV's way does the prefill not hide?

The prefill side is a whole engine and a prefill worker, the decode side the cache and the endpoint of one. Both processes'
transfers go through the real endpoints.
"""

import multiprocessing
import queue
import statistics
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from pdserve.core.failures import FailureKind
from pdserve.core.messages import Prefill, TransferAddress, TransferStats
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.device import Device
from pdserve.engine.engine import EngineOptions
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.outbox import Outbox
from pdserve.engine.token_masks import NoGrammars, TokenMasks
from pdserve.kernels import KernelRequirements, load_kernels
from pdserve.kv_transfer import TransferEndpoint
from pdserve.prefill_worker.worker import PrefillWorker

from .engines import BLOCK_SIZE, device_of, layout_of, open_random_engine
from .report import Check, Row
from .sections import Context
from .shapes import LLAMA_8B, Shape

_PROMPT_LEN = 8192
_MAX_BATCH_TOKENS = 2048
_REPEATS = 5
_TIMEOUT_S = 30.0
_MOST_EXPOSED = 0.05  # of TTFT


class Endings:
    """How transfers end, for whoever waits for the one under way."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[TransferStats | RuntimeError | None] = queue.SimpleQueue()

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._ended.put(None)

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._ended.put(stats)

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._ended.put(RuntimeError(f"transfer failed: {error}"))

    on_receive_failed = on_send_failed

    def wait(self) -> TransferStats | None:
        ended = self._ended.get(timeout=_TIMEOUT_S)
        if isinstance(ended, RuntimeError):
            raise ended
        return ended


def measure(context: Context) -> None:
    measure_shape(context, LLAMA_8B, "cuda_ipc", _PROMPT_LEN)


def measure_shape(context: Context, shape: Shape, transport: str, prompt_len: int) -> None:
    """A prompt fills either cache, so that the caches can be compared as a whole."""
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
    child = spawning.Process(target=decode_side, args=(child_pipe, shape, options, transport, prompt_len), daemon=True)
    child.start()
    child_pipe.close()
    try:
        _measure(context, shape, options, transport, prompt_len, pipe)
    finally:
        pipe.close()  # which ends it
        child.join(_TIMEOUT_S)


def _measure(
    context: Context, shape: Shape, options: EngineOptions, transport: str, prompt_len: int, pipe: "Connection[Any, Any]"
) -> None:
    engine, endings = open_random_engine(shape, options), Endings()
    endpoint = _endpoint("p", engine.cache, endings, transport, device_of(options))
    endpoint.start()
    address: TransferAddress = pipe.recv()
    outbox = Outbox("p", 1)
    num_layers = engine.config.num_layers
    masks, sizes = TokenMasks(NoGrammars()), {"num_layers": num_layers, "max_batch_tokens": _MAX_BATCH_TOKENS}
    worker = PrefillWorker(engine.kv, engine.runner, endpoint, outbox, masks, **sizes)
    times_s, all_stats = [], []
    for number in range(_REPEATS + 1):  # the first compiles and connects
        pipe.send(number)
        pipe.recv()
        ttft_s, stats = _prefill(worker, outbox, endings, _spec(shape, number, prompt_len), address)
        pipe.recv()
        times_s.append(ttft_s)
        all_stats.append(stats)
    pipe.send("digest")
    there, here = pipe.recv(), _digest(engine.cache, num_layers)
    endpoint.close()
    context.emit(Check(f"KV of {prompt_len} tokens over {transport}: what arrived is what was sent", float(there != here), 0.0))
    ttft_s, exposed_s = statistics.median(times_s[1:]), statistics.median(stats.exposed_s for stats in all_stats[1:])
    hidden = sum(stats.hidden_bytes for stats in all_stats[1:]) / sum(stats.num_bytes for stats in all_stats[1:])
    what = f"KV transfer 1P1D, {shape.name}, {prompt_len} tokens, exposed"
    share, target = exposed_s / ttft_s, f"<= {_MOST_EXPOSED:.0%} of TTFT"
    context.emit(Row(what, f"{exposed_s * 1e3:.2f} ms", f"{share:.1%}", target, share <= _MOST_EXPOSED))
    gigabytes = all_stats[0].num_bytes / 1e9
    context.emit(Row(f"  TTFT; {gigabytes:.2f} GB, {hidden:.1%} of it hidden", f"{ttft_s * 1e3:.1f} ms"))


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
        prompt_token_ids=tuple(torch.randint(shape.config.vocab_size, (prompt_len,), generator=generator).tolist()),
        sampling=SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True),
    )


def decode_side(pipe: "Connection[Any, Any]", shape: Shape, options: EngineOptions, transport: str, prompt_len: int) -> None:
    """Expects what the other process announces, until that closes the pipe."""
    device, layout = device_of(options), layout_of(shape, options)
    requirements = KernelRequirements(getattr(torch, layout.dtype), layout.head_dim, layout.block_size)
    assert options.num_blocks is not None
    cache = KVCache(layout, options.num_blocks, load_kernels(options.device, requirements, "auto", 1), device)
    endings = Endings()
    endpoint = _endpoint("d", cache, endings, transport, device)
    pipe.send(endpoint.start())
    block_ids = tuple(torch.randperm(options.num_blocks).tolist())
    with suppress(EOFError):
        while True:
            asked = pipe.recv()
            if asked == "digest":
                pipe.send(_digest(cache, layout.num_layers))
                continue
            endpoint.expect(TransferId("bench", asked), ("p", 1), block_ids, prompt_len)
            pipe.send("ready")
            endings.wait()
            pipe.send("done")
    endpoint.close()


def _endpoint(name: str, cache: KVCache, endings: Endings, transport: str, device: Device) -> TransferEndpoint:
    options: dict[str, Any] = {}
    if device.torch_device.type == "cuda":
        from pdserve.kv_transfer.cuda_memory import CudaGpu

        options["gpu"] = CudaGpu(device.torch_device)
    return TransferEndpoint(
        cache, endings, worker_id=name, incarnation=1, token="bench", host="127.0.0.1", transport=transport, **options
    )


def _digest(cache: KVCache, num_layers: int) -> int:
    """Of all its bytes, in whatever blocks they lie."""
    parts = (part.view(torch.int16) for layer in range(num_layers) for part in cache.layer(layer))
    return sum((index + 1) * int(part.sum(dtype=torch.int64)) for index, part in enumerate(parts))
