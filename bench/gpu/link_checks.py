"""KV from one cache to another over shared memory, by the endpoints that serve: what workers on different
GPUs of a host do.

Both ends are in this process, on one device and behind its queue, through which a GPU's copies go in order.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal
from unittest.mock import patch

import torch

from pdserve.core.messages import KVLayout
from pdserve.core.request import TransferId
from pdserve.engine.device import CudaDevice, Device, HostDevice
from pdserve.engine.kv_cache import KVCache
from pdserve.kernels import KernelRequirements
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.launch import INTERPRETED, Launch
from pdserve.kv_transfer import TransferConfig

from ..transfer_endings import Endings
from .batches import num_different, row_error
from .cases import Case
from .transfer import endpoint_of

_NUM_LAYERS = 2
_PAGES = 64, 16  # page sizes of the sender and of the receiver
_TIMEOUT_S = 600.0 if INTERPRETED else 30.0  # the interpreter may have a share of a busy processor
_SMALL_CHUNKS = TransferConfig(chunk_bytes=1 << 16, dead_after_s=_TIMEOUT_S, chunk_timeout_s=_TIMEOUT_S)
_DTYPE = torch.bfloat16


class _QueuedHost(HostDevice):
    """The processor, reached through a queue as a GPU is."""

    runs_ahead = True


def cases(is_toy: bool) -> Iterator[Case]:
    heads, num_tokens = ((2, 32), 150) if is_toy else ((8, 128), 1000)
    wires: tuple[tuple[Literal["raw", "int8"], float], ...] = (("raw", 0.0), ("int8", 2e-2))
    for wire, tolerance in wires:
        name = (
            f"KV over shared memory, {wire}, {num_tokens} tokens from pages of {_PAGES[0]} to pages of"
            f" {_PAGES[1]}"
        )
        yield Case(name, tolerance, partial(_error, wire, heads, num_tokens))


def _error(wire: Literal["raw", "int8"], heads: tuple[int, int], num_tokens: int) -> float:
    """The error of the received data; raw: the count of numbers that differ."""
    device: Device = CudaDevice() if torch.cuda.is_available() else _QueuedHost()
    sender, receiver = (_cache(wire, heads, page, num_tokens, device) for page in _PAGES)
    for layer in range(_NUM_LAYERS):
        for part in sender.layer(layer):
            part.copy_(torch.randn(part.shape))
    sent_from, received_in = (torch.randperm(cache.num_blocks).tolist() for cache in (sender, receiver))
    transfer, endings = TransferId("check", 0), [Endings(), Endings()]
    with ExitStack() as stack:
        if INTERPRETED:
            stack.enter_context(_one_kernel_at_a_time())
        ends = [
            endpoint_of(name, cache, ending, "shm", device, _SMALL_CHUNKS)
            for name, cache, ending in zip(("p", "d"), (sender, receiver), endings, strict=True)
        ]
        for end in ends:
            stack.callback(end.close)
        p, d = ends
        _, address = [end.start() for end in ends]
        d.expect(transfer, ("p", 1), tuple(received_in), num_tokens)
        p.send(transfer, address, (), num_tokens)
        p.extend(transfer, tuple(sent_from))
        for layer in range(_NUM_LAYERS):
            p.computed(transfer, layer, layer + 1, 0, num_tokens)
        p.prefill_done(transfer)
        p.commit(transfer, b"")
        for ending in endings:
            ending.wait(_TIMEOUT_S)
        sent, arrived = _tokens(sender, sent_from, num_tokens), _tokens(receiver, received_in, num_tokens)
    return num_different(arrived, sent) if wire == "raw" else row_error(arrived, sent)


def _cache(
    wire: Literal["raw", "int8"], heads: tuple[int, int], page: int, num_tokens: int, device: Device
) -> KVCache:
    num_kv_heads, head_dim = heads
    layout = KVLayout(_NUM_LAYERS, num_kv_heads, head_dim, "bfloat16", page, "check", wire)
    kernels = TritonKernels(KernelRequirements(_DTYPE, head_dim, page))
    return KVCache(layout, -(-num_tokens // page), kernels, device)


def _tokens(cache: KVCache, block_ids: list[int], num_tokens: int) -> torch.Tensor:
    """[layers * 2, num_tokens, Hkv, D]"""
    parts = [part for layer in range(_NUM_LAYERS) for part in cache.layer(layer)]
    return torch.stack([part[block_ids].transpose(1, 2).flatten(0, 1)[:num_tokens] for part in parts]).cpu()


@contextmanager
def _one_kernel_at_a_time() -> Iterator[None]:
    """The interpreter knows one running program for the whole process, and each end has a thread of its
    own."""
    lock, run = threading.Lock(), Launch.run

    def run_alone(launch: Launch) -> None:
        with lock:
            run(launch)

    with patch.object(Launch, "run", run_alone):
        yield
