"""Attention alone: decode beside a copy's bandwidth, prefill beside what torch has for the same prompt."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pdserve.kernels import KernelRequirements
from pdserve.kernels.triton.kernels import TritonKernels

from .batches import paged_batch, row_error
from .limits import COPY, PRODUCT
from .report import Note, Row, at_least
from .sections import Context
from .timing import median_in_graph_s, median_s

_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 64  # Llama 8B
_SCALE = _HEAD_DIM**-0.5
_CONTEXT_LEN = 4096
_TOKEN_BYTES = 2 * _KV_HEADS * _HEAD_DIM * 2
# calls rotate over at least as much, so that the L2 keeps nothing from one call to the next
_CACHE_BYTES = 1 << 30
_BATCH_SIZES = (32, 1, 2, 4, 8, 16, 64, 128, 256)
_JUDGED_FROM = 256e6  # bytes of keys and values
_PROMPT_LEN = 8192
_PREFILL_WANTED = 480e12
_INNER = 5
_SECONDS_OF_A_PEER = 25.0  # compiling included


def measure(context: Context) -> None:
    for batch_size in _BATCH_SIZES:
        _measure_decode(context, batch_size)
    _measure_prefill(context)


def _measure_decode(context: Context, batch_size: int) -> None:
    batch, num_blocks = paged_batch([1] * batch_size, [_CONTEXT_LEN] * batch_size, _BLOCK_SIZE)
    num_bytes = batch_size * _CONTEXT_LEN * _TOKEN_BYTES
    caches = [
        _random(2, num_blocks, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM)
        for _ in range(max(-(-_CACHE_BYTES // num_bytes), 2))
    ]
    q, kernels = _random(batch_size, _HEADS, _HEAD_DIM), _kernels()

    def attend(cache: torch.Tensor) -> Callable[[], object]:
        return lambda: kernels.paged_attention(q, cache[0], cache[1], batch, _SCALE)

    step_s = median_in_graph_s([attend(cache) for cache in caches])
    share = context.share(COPY, num_bytes / step_s)
    what, measured = (
        f"decode attention, Llama 8B, batch {batch_size} at {_CONTEXT_LEN}",
        f"{step_s * 1e6:.0f} us",
    )
    if batch_size == 32:
        context.emit(at_least(what, measured, share, 0.9, "copy"))
    elif num_bytes >= _JUDGED_FROM:
        context.emit(at_least(what, measured, share, 0.7, "copy"))
    else:
        context.emit(Row(what, measured, f"{share:.1%}", "(little to read)"))


def _measure_prefill(context: Context) -> None:
    """One prompt. Peers get its keys and values in one piece and in the layout they like."""
    batch, num_blocks = paged_batch([_PROMPT_LEN], [_PROMPT_LEN], _BLOCK_SIZE)
    cache, q, kernels = (
        _random(2, num_blocks, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM),
        _random(_PROMPT_LEN, _HEADS, _HEAD_DIM),
        _kernels(),
    )
    out = kernels.paged_attention(q, cache[0], cache[1], batch, _SCALE)
    seconds = median_s(lambda: kernels.paged_attention(q, cache[0], cache[1], batch, _SCALE), inner=_INNER)
    per_s = _flops() / seconds
    what, of_product = f"prefill attention, Llama 8B, {_PROMPT_LEN} tokens", context.share(PRODUCT, per_s)
    target = f">= {_PREFILL_WANTED / 1e12:.0f} TFLOP/s"
    context.emit(
        Row(what, f"{per_s / 1e12:.0f} TFLOP/s", f"{of_product:.1%}", target, per_s >= _PREFILL_WANTED)
    )
    if not context.has_peers:
        return
    blocks = batch.block_tables[0].long().to(q.device)
    k, v = (part[blocks].transpose(0, 1).flatten(1, 2).contiguous() for part in cache)  # [Hkv, tokens, D]
    for name, make in (
        ("torch SDPA, cuDNN", _cudnn),
        ("FlexAttention, compiled", _flex),
        ("FlashInfer", _flashinfer),
    ):
        _measure_peer(context, f"  {name}", make, (q, k, v), out.view(q.shape))


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Peer = Callable[
    [Tensors], Callable[[], torch.Tensor] | None
]  # given q, k, v: what computes [tokens, Hq, D]; None: not here


def _measure_peer(context: Context, name: str, make: Peer, given: Tensors, ours: torch.Tensor) -> None:
    """Requires the peer's result to equal ours; otherwise its time is meaningless."""
    if context.left_s < _SECONDS_OF_A_PEER:
        context.emit(Note(f"{name.strip()}: there was no time left for it"))
        return
    try:
        call = make(given)
        if call is None:
            context.emit(Note(f"{name.strip()} is not installed"))
            return
        difference = row_error(call(), ours)
        per_s = _flops() / median_s(call, inner=_INNER)
    except Exception as error:  # a peer that does not run here is reported, and is no failure of ours
        context.emit(Note(f"{name.strip()}: {type(error).__name__}: {str(error)[:200]}"))
        return
    agrees = "" if difference < 0.02 else f"(differs from ours by {difference:.2g})"
    context.emit(Row(name, f"{per_s / 1e12:.0f} TFLOP/s", f"{context.share(PRODUCT, per_s):.1%}", agrees))


def _cudnn(given: Tensors) -> Callable[[], torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _batched(given)
    # it knows no groups in every version
    k, v = (tensor.repeat_interleave(_HEADS // _KV_HEADS, dim=1) for tensor in (k, v))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=_SCALE)[0].transpose(0, 1)

    return call


def _flex(given: Tensors) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _batched(given)
    mask = create_block_mask(
        lambda b, h, query, key: query >= key, None, None, _PROMPT_LEN, _PROMPT_LEN, device="cuda"
    )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=_SCALE, enable_gqa=True)[0].transpose(0, 1)


def _flashinfer(given: Tensors) -> Callable[[], torch.Tensor] | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer  # type: ignore[import-not-found, unused-ignore]

    q, k, v = given
    k, v = (tensor.transpose(0, 1).contiguous() for tensor in (k, v))  # [tokens, Hkv, D]
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=_SCALE)


def _batched(given: Tensors) -> Tensors:
    """[1, heads, tokens, D] each."""
    q, k, v = given
    return q.transpose(0, 1).contiguous()[None], k[None], v[None]


def _flops() -> float:
    return 4.0 * (_PROMPT_LEN * (_PROMPT_LEN + 1) // 2) * _HEADS * _HEAD_DIM


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _kernels() -> TritonKernels:
    return TritonKernels(KernelRequirements(torch.bfloat16, _HEAD_DIM, _BLOCK_SIZE))
