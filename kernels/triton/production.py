"""Every kernel with the launches of popular models, on tensors without memory: the compile gate compiles
these.

A shape is listed here when it leads to other meta-parameters or another layout of registers than its
neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..sampling import SamplingBatch
from ..wire import KVPart, WireFormat, part_bytes
from .activation import silu_mul_launch
from .decode_attention import DecodeBatch, DecodeWorkspace, decode_launch
from .decode_plan import DecodeShape, plan_decode
from .drawn_tokens import take_launch
from .launch import HOPPER, Launch
from .norm import norm_launch
from .prefill_attention import PrefillBatch, prefill_launches, prefill_workspace
from .prefill_plan import PrefillPlan
from .rope_cache import rope_launch
from .sampling import sample_launch
from .token_mask import mask_launch
from .transfer import checksum_launch, transfer_launch

TARGETS = (80, 90, 100)
_NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_MAX_CONTEXT_LEN = 32_768


@dataclass(frozen=True)
class Heads:
    """A model's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Heads("Llama-3.1-8B", 32, 8, 128)
LLAMA_1B = Heads("Llama-3.2-1B", 32, 8, 64)
QWEN3_06B = Heads("Qwen3-0.6B", 16, 8, 128)
QWEN2_7B = Heads("Qwen2.5-7B", 28, 4, 128)
HEAD_DIM_80 = Heads("head_dim 80", 32, 8, 80)
HEAD_DIM_256 = Heads("head_dim 256", 16, 2, 256)


def production_launches(target: int) -> Iterator[tuple[str, Launch]]:
    """Yields (purpose, launch) for a GPU of that compute capability."""
    yield from _decode(target)
    yield from _prefill(target)
    yield from _norms()
    yield from _ropes()
    yield from _samplings()
    yield from _transfers()
    yield "any", take_launch(*(_int64(n) for n in (64, 64, 1024, 64)))
    yield "14336 wide", silu_mul_launch(_bfloat16(64, 2 * 14336), _bfloat16(64, 14336))


def _decode(target: int) -> Iterator[tuple[str, Launch]]:
    shapes = [
        (LLAMA_8B, 1, 64, 1, None, torch.bfloat16),
        (LLAMA_8B, 64, 64, 1, None, torch.bfloat16),
        (LLAMA_8B, 64, 64, 8, None, torch.bfloat16),
        (LLAMA_1B, 1, 64, 1, None, torch.bfloat16),
        (LLAMA_1B, 64, 64, 1, None, torch.bfloat16),
        (QWEN3_06B, 64, 16, 4, None, torch.bfloat16),
        (QWEN2_7B, 64, 64, 8, None, torch.bfloat16),
        (HEAD_DIM_80, 1, 16, 1, 4096, torch.bfloat16),
        (HEAD_DIM_80, 64, 16, 1, 4096, torch.bfloat16),
        (HEAD_DIM_256, 1, 64, 1, None, torch.bfloat16),
        (HEAD_DIM_256, 64, 64, 1, None, torch.bfloat16),
        (LLAMA_8B, 1, 64, 1, None, torch.float32),
        (LLAMA_8B, 64, 64, 1, None, torch.float32),
        (LLAMA_8B, 64, 64, 8, None, torch.float32),
        (LLAMA_1B, 64, 16, 8, None, torch.float32),
    ]
    for heads, max_seqs, block_size, max_query_len, window, dtype in shapes:
        shape = DecodeShape(
            max_seqs=max_seqs,
            max_query_len=max_query_len,
            num_kv_heads=heads.num_kv_heads,
            block_size=block_size,
            num_multiprocessors=_NUM_MULTIPROCESSORS[target],
            window=window,
            takes_turns=max_seqs == 1,
        )
        plan = plan_decode(shape, [1], [_MAX_CONTEXT_LEN], _MAX_CONTEXT_LEN)
        rows = heads.num_heads // heads.num_kv_heads * max_query_len
        partials = (len(plan.pieces), heads.num_kv_heads, rows)
        q, cache = _queries(max_seqs, heads, dtype), _cache(heads, block_size, dtype)
        tables = _int32(max_seqs, _MAX_CONTEXT_LEN // block_size)
        batch = DecodeBatch(_int32(max_seqs + 1), _int32(max_seqs), tables, plan)
        arrivals = _int32(max_seqs, heads.num_kv_heads)
        workspace = DecodeWorkspace(_float32(*partials, heads.head_dim), _float32(*partials), arrivals)
        launch = decode_launch(q, cache, cache, batch, workspace, 0.1, q)
        case = (
            f"{heads.name}, {max_seqs} x {max_query_len} queries, page"
            f" {block_size}{_sliding(window)}{_wide(dtype)}"
        )
        yield case, launch


def _prefill(target: int) -> Iterator[tuple[str, Launch]]:
    shapes = [
        *(
            [(LLAMA_8B, 128, None, torch.bfloat16)] if target == HOPPER else []
        ),  # elsewhere its tiles are those of page 64
        (LLAMA_8B, 64, None, torch.bfloat16),
        (LLAMA_8B, 16, None, torch.bfloat16),
        (LLAMA_8B, 64, 4096, torch.bfloat16),
        (LLAMA_8B, 16, 4096, torch.bfloat16),
        (HEAD_DIM_256, 64, None, torch.bfloat16),
        (LLAMA_8B, 64, None, torch.float32),
        (LLAMA_1B, 16, 4096, torch.float32),
    ]
    for heads, block_size, window, dtype in shapes:
        q, cache = _queries(4096, heads, dtype), _cache(heads, block_size, dtype)
        case = f"{heads.name}, page {block_size}{_sliding(window)}{_wide(dtype)}"
        for kind, plan in [
            ("", PrefillPlan(_int32(32, 2))),
            (", split", PrefillPlan(_int32(4, 2), _int32(16, 3), _int32(5))),
        ]:
            batch = PrefillBatch(_int32(9), _int32(8), _int32(8, _MAX_CONTEXT_LEN // block_size), plan)
            workspace = prefill_workspace(plan, cache, target)
            for launch in prefill_launches(q, cache, cache, batch, workspace, 0.1, window, q, target):
                yield case + kind, launch


def _norms() -> Iterator[tuple[str, Launch]]:
    for width, adds in [(4096, True), (4096, False), (8192, True)]:
        x = _bfloat16(64, width)
        yield (
            f"{width} wide{', residual' if adds else ''}",
            norm_launch(x, x if adds else None, x[0], 1e-5, x),
        )


def _ropes() -> Iterator[tuple[str, Launch]]:
    for heads, norms in [(LLAMA_8B, False), (QWEN3_06B, True), (HEAD_DIM_256, True)]:
        cache = _cache(heads, 64)
        qkv = _bfloat16(64, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
        index, norm = _int64(64), _bfloat16(heads.head_dim) if norms else None
        angles = _float32(_MAX_CONTEXT_LEN, heads.head_dim)
        launch = rope_launch(qkv, index, angles, norm, norm, 1e-6, cache, cache, index, _queries(64, heads))
        yield f"{heads.name}{', norms' if norms else ''}", launch


def _samplings() -> Iterator[tuple[str, Launch]]:
    float64 = torch.empty(64, dtype=torch.float64, device="meta")
    batch = SamplingBatch(
        _int32(64), float64, _int32(64), float64, float64, _int64(64), _int32(64), _int32(64)
    )
    for model, vocab_size in [("Llama-3", 128_256), ("GPT-2", 50_257)]:
        logits, bits = _float32(64, vocab_size), _bytes(64, -(-vocab_size // 8))
        yield f"{model}, {vocab_size} tokens", sample_launch(logits, batch, _int64(64))
        yield f"{model}, {vocab_size} tokens", mask_launch(logits, _int32(64), bits)


def _transfers() -> Iterator[tuple[str, Launch]]:
    total = _int64(1)
    one = range(1, 2)  # Triton compiles numbers that are 1 as constants
    for heads, part, wire_format in [
        (LLAMA_8B, KVPart(range(8, 16), range(8), range(64, 192)), WireFormat.RAW),
        (LLAMA_8B, KVPart(range(8, 16), range(8), range(64, 192)), WireFormat.INT8),
        (HEAD_DIM_80, KVPart(one, one, one), WireFormat.RAW),
        (HEAD_DIM_80, KVPart(one, one, one), WireFormat.INT8),
    ]:
        cache = _bfloat16(32, 2, 1024, heads.num_kv_heads, 64, heads.head_dim)
        buffer = _bytes(part_bytes(cache, part, wire_format))
        for to_wire in (True, False):
            case = f"{heads.name}, {wire_format.value}, {'gather' if to_wire else 'scatter'}"
            yield case, transfer_launch(cache, _int32(3), part, buffer, wire_format, to_wire, total)
    yield "any", checksum_launch(_bytes(1 << 21), total)


def _sliding(window: int | None) -> str:
    return "" if window is None else f", window {window}"


def _wide(dtype: torch.dtype) -> str:
    return ", float32" if dtype == torch.float32 else ""


def _queries(num_tokens: int, heads: Heads, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((num_tokens, heads.num_heads, heads.head_dim), dtype=dtype, device="meta")


def _cache(heads: Heads, block_size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((1024, heads.num_kv_heads, block_size, heads.head_dim), dtype=dtype, device="meta")


def _bfloat16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _bytes(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _int64(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _float32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")
