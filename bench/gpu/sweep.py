"""Attention and transfers by other parameters than those that serve: whether a target is missed for their
sake.

Every variant is compared with what serves before its time counts. In the interpreter that is all that there
is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import msgspec
import torch

from pdserve.kernels import KernelRequirements
from pdserve.kernels.triton.decode_attention import DecodeBatch, decode_attention, decode_workspace
from pdserve.kernels.triton.decode_plan import DecodeShape, plan_decode
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.launch import Launch, cdiv
from pdserve.kernels.triton.paged_attention import num_multiprocessors
from pdserve.kv_transfer import TransferConfig

from . import interpreter, transfer
from .attention_checks import LLAMA_8B_HEADS
from .batches import paged_batch, row_error
from .cases import TOLERANCES
from .limits import COPY, PRODUCT
from .report import Check, Message, Note, NotRun, Row
from .sections import Context
from .shapes import LLAMA_1B, TOY
from .timing import median_in_graph_s, median_s

_DTYPE = torch.bfloat16
_NEEDS_A_GPU = "needs a GPU"
_CACHE_BYTES = 1 << 30  # calls rotate over at least as much, so that the L2 keeps nothing
# at about; all of a long prompt's would take the host longer than the GPU takes to compute them
_MAX_ROWS_COMPARED = 512
_SECONDS_OF_A_VARIANT = 6.0  # with compiling


@dataclass(frozen=True)
class Variant:
    """The differences from the production launch; None: no difference."""

    name: str
    num_stages: int | None = None
    num_warps: int | None = None
    constants: Mapping[str, int] = field(default_factory=dict)
    waves: float = 1.0  # factor on decode's programs, and so on the number of pieces

    def of(self, launch: Launch) -> Launch:
        return msgspec.structs.replace(
            launch,
            num_stages=self.num_stages or launch.num_stages,
            num_warps=self.num_warps or launch.num_warps,
            arguments={**launch.arguments, **self.constants},
        )


@dataclass(frozen=True)
class BatchShape:
    """`count` sequences of equal lengths."""

    name: str
    count: int
    query_len: int
    context_len: int


DECODE_BATCHES = (BatchShape("batch 32 at 4096", 32, 1, 4096), BatchShape("batch 1 at 8192", 1, 1, 8192))
DECODE_VARIANTS = (
    Variant("as it serves"),
    Variant("half the waves", waves=0.5),
    Variant("twice the waves", waves=2.0),
    Variant("3 stages", num_stages=3),
    Variant("4 stages", num_stages=4),
    Variant("6 stages", num_stages=6),
    Variant("tile of 32 keys", constants={"BLOCK_N": 32}),
    Variant("tile of 128 keys", constants={"BLOCK_N": 128}),
)
PREFILL_BATCHES = (
    BatchShape("8192 tokens", 1, 8192, 8192),
    BatchShape("128 tokens behind 8064 cached", 1, 128, 8192),
)
PREFILL_PAGES = (64, 128)
PREFILL_VARIANTS = (
    Variant("as it serves"),
    Variant("2 stages", num_stages=2),
    Variant("4 stages", num_stages=4),
)
CHUNK_MIB = (4, 8, 16)
_TOY_DECODE = (BatchShape("batch 2 at 300", 2, 1, 300),)
_TOY_PREFILL = (BatchShape("20 tokens behind 130 cached", 1, 20, 150),)
_TOY_HEADS = (4, 2, 64)
_TOY_CHUNK_MIB = (1 / 16, 1 / 8)


def measure(context: Context) -> None:
    interpreter.patch_language_once()
    for batch in _TOY_DECODE if context.interpret else DECODE_BATCHES:
        _sweep_decode(context, batch)
    for page in PREFILL_PAGES:
        for batch in _TOY_PREFILL if context.interpret else PREFILL_BATCHES:
            _sweep_prefill(context, batch, page)
    _sweep_chunks(context)


def _sweep_decode(context: Context, batch: BatchShape) -> None:
    num_heads, num_kv_heads, head_dim = _TOY_HEADS if context.interpret else LLAMA_8B_HEADS
    page = 64
    num_bytes = 2 * batch.count * batch.context_len * num_kv_heads * head_dim * _DTYPE.itemsize
    num_caches = 1 if context.interpret else max(cdiv(_CACHE_BYTES, num_bytes), 2)
    paged, num_blocks = paged_batch([1] * batch.count, [batch.context_len] * batch.count, page)
    caches = [_random(context, 2, num_blocks, num_kv_heads, page, head_dim) for _ in range(num_caches)]
    q, scale = _random(context, batch.count, num_heads, head_dim), head_dim**-0.5
    there = torch.device(context.device)
    usual = DecodeShape(batch.count, 1, num_kv_heads, page, num_multiprocessors(there))
    expected: torch.Tensor | None = None
    for variant in DECODE_VARIANTS:
        shape = _with_waves(usual, variant.waves, batch)
        plan = plan_decode(shape, [1] * batch.count, [batch.context_len] * batch.count, batch.context_len)
        lens = paged.query_start_loc.to(there), paged.context_lens.to(there)
        decode = DecodeBatch(*lens, paged.block_tables.to(there), plan.to(context.device))
        workspace = decode_workspace(shape, num_heads, head_dim, batch.context_len, context.device)
        calls = [
            partial(decode_attention, q, cache[0], cache[1], decode, workspace, scale) for cache in caches
        ]
        name = f"decode attention, {batch.name}: {variant.name}"
        out = _try(context, name, variant, calls, expected, COPY, num_bytes, is_short=True)
        expected = out if expected is None else expected


def _with_waves(usual: DecodeShape, times: float, batch: BatchShape) -> DecodeShape:
    """`usual` with about `times` as many pieces."""
    if times == 1.0:
        return usual
    num_tiles = batch.count * cdiv(batch.context_len, usual.tile)
    tiles_of_a_piece = max(cdiv(num_tiles, max(int(usual.wanted_pieces * times), 1)), 1)
    return replace(usual, split_keys=tiles_of_a_piece * usual.tile)


def _sweep_prefill(context: Context, batch: BatchShape, page: int) -> None:
    num_heads, num_kv_heads, head_dim = _TOY_HEADS if context.interpret else LLAMA_8B_HEADS
    paged, num_blocks = paged_batch([batch.query_len] * batch.count, [batch.context_len] * batch.count, page)
    cache = _random(context, 2, num_blocks, num_kv_heads, page, head_dim)
    q, scale = _random(context, batch.count * batch.query_len, num_heads, head_dim), head_dim**-0.5
    num_cached = batch.context_len - batch.query_len
    num_pairs = batch.query_len * num_cached + batch.query_len * (batch.query_len + 1) // 2
    flops = 4.0 * batch.count * num_pairs * num_heads * head_dim
    expected: torch.Tensor | None = None
    for variant in PREFILL_VARIANTS:
        kernels = TritonKernels(KernelRequirements(_DTYPE, head_dim, page))
        call = partial(kernels.paged_attention, q, cache[0], cache[1], paged, scale)
        name = f"prefill attention, {batch.name}, page {page}: {variant.name}"
        out = _try(context, name, variant, [call], expected, PRODUCT, flops, is_short=False)
        expected = out if expected is None else expected


def _try(
    context: Context,
    name: str,
    variant: Variant,
    calls: Sequence[Callable[[], torch.Tensor]],
    expected: torch.Tensor | None,
    limit: str,
    work: float,
    *,
    is_short: bool,
) -> torch.Tensor | None:
    """Compares, then measures `work` bytes or operations beside `limit`; returns what came out, None where
    nothing did."""
    if context.left_s < _SECONDS_OF_A_VARIANT:
        context.emit(Note(f"{name}: there was no time left for it"))
        return None
    with _launched_as(variant):
        try:
            out = calls[0]()
            out = out[:: max(len(out) // _MAX_ROWS_COMPARED, 1)].clone()
        except Exception as error:  # shared memory or registers that a variant would need and no GPU has
            context.emit(_finding(name, error))
            return None
        difference = 0.0 if expected is None else row_error(out, expected.view(out.shape))
        context.emit(Check(name, difference, TOLERANCES[_DTYPE]))
        if context.interpret:
            context.emit(Row(name, _NEEDS_A_GPU))
            return out
        seconds = median_in_graph_s(calls) if is_short else median_s(calls[0], inner=5)
    context.emit(Row(name, f"{seconds * 1e6:.0f} us", f"{context.share(limit, work / seconds):.1%}"))
    return out


def _finding(name: str, error: Exception) -> Message:
    if interpreter.is_to_blame(error):
        return NotRun(name, interpreter.why())
    return Note(f"{name}: {type(error).__name__}: {str(error)[:200]}")


@contextmanager
def _launched_as(variant: Variant) -> Iterator[None]:
    """Attention kernels, the only ones with a tile of keys, are launched by the variant meanwhile."""
    run = Launch.run

    def run_variant(launch: Launch) -> None:
        run(variant.of(launch) if "BLOCK_N" in launch.arguments else launch)

    with patch.object(Launch, "run", run_variant):
        yield


def _sweep_chunks(context: Context) -> None:
    """The 1B model's, whose prefill leaves less time to hide behind than the 8B model's."""
    toy = context.interpret
    shape, transport, prompt_len = (TOY, "shm", 256) if toy else (LLAMA_1B, "cuda_ipc", 8192)
    configs = [TransferConfig(chunk_bytes=int(mib * 2**20)) for mib in (_TOY_CHUNK_MIB if toy else CHUNK_MIB)]
    if not toy:
        transfer.measure_shape(context, shape, transport, prompt_len, configs)
        return
    quiet = replace(context, emit=lambda message: context.emit(_untimed(message)))
    transfer.measure_shape(quiet, shape, transport, prompt_len, configs)


def _untimed(message: Any) -> Any:
    """A toy's time says nothing."""
    return Row(message.what, _NEEDS_A_GPU) if isinstance(message, Row) else message


def _random(context: Context, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=_DTYPE, device=context.device)
