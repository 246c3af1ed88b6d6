"""Moves KV between the paged cache and flat chunks for the wire: one kernel copies, converts and checksums
the chunk.

A program moves some tokens of one head. Sums of 64-bit words wrap around, so programs add theirs in any order
and the checksum equals that of the CPU's kernels."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..interface import check_wire
from ..wire import INT8_STEPS, SMALLEST_ROW, KVPart, WireFormat, check_part
from .launch import Launch, cdiv, power_of_two
from .paged_attention import to_device

_WORD = 8
_WORDS_PER_PROGRAM = 2048
_VALUES_PER_PROGRAM = 4096
_KEY_STEP = tl.constexpr(0x9E3779B185EBCA87)
_INT8_STEPS = tl.constexpr(float(INT8_STEPS))
_SMALLEST_ROW = tl.constexpr(SMALLEST_ROW)
# They differ from chunk to chunk: kernels specialised for them would be compiled in the middle of transfers.
_OF_A_CHUNK = ["first_layer", "first_token", "num_tokens"]


def gather_part(
    cache: torch.Tensor, block_ids: Sequence[int], part: KVPart, buffer: torch.Tensor, wire_format: WireFormat
) -> torch.Tensor:
    """`kernels.wire.gather_part`; in the int8 format a value just between two steps may be rounded to the
    other."""
    return _transfer(cache, block_ids, part, buffer, wire_format, to_wire=True)


def scatter_part(
    cache: torch.Tensor, block_ids: Sequence[int], part: KVPart, buffer: torch.Tensor, wire_format: WireFormat
) -> torch.Tensor:
    """`kernels.wire.scatter_part`."""
    return _transfer(cache, block_ids, part, buffer, wire_format, to_wire=False)


def checksum(buffer: torch.Tensor) -> torch.Tensor:
    """`kernels.wire.checksum`."""
    check_wire(buffer)
    total = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    if buffer.numel():
        checksum_launch(buffer, total).run()
    return total


def _transfer(
    cache: torch.Tensor,
    block_ids: Sequence[int],
    part: KVPart,
    buffer: torch.Tensor,
    wire_format: WireFormat,
    to_wire: bool,
) -> torch.Tensor:
    check_part(cache, block_ids, part, buffer, wire_format)
    ids = to_device(torch.frombuffer(array("i", block_ids), dtype=torch.int32), cache.device)
    total = torch.zeros(1, dtype=torch.int64, device=cache.device)
    transfer_launch(cache, ids, part, buffer, wire_format, to_wire, total).run()
    return total


def checksum_launch(buffer: torch.Tensor, total: torch.Tensor) -> Launch:
    words = buffer.view(torch.int64)
    arguments = {"words": words, "num_words": len(words), "total": total, "BLOCK": _WORDS_PER_PROGRAM}
    return Launch(_sum_words, (cdiv(len(words), _WORDS_PER_PROGRAM),), arguments, num_warps=4, num_stages=1)


def transfer_launch(
    cache: torch.Tensor,
    block_ids: torch.Tensor,
    part: KVPart,
    buffer: torch.Tensor,
    wire_format: WireFormat,
    to_wire: bool,
    total: torch.Tensor,
) -> Launch:
    """`block_ids` int32; adds the checksum to `total`, int64 [1]."""
    _, _, num_blocks, num_kv_heads, block_size, _ = cache.shape
    common = {
        "block_ids": block_ids,
        "total": total,
        "first_layer": part.layers.start,
        "first_head": part.heads.start,
        "first_token": part.tokens.start,
        "num_heads": len(part.heads),
        "num_tokens": len(part.tokens),
        "num_blocks": num_blocks,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "TO_WIRE": to_wire,
    }
    move = _raw_launch if wire_format is WireFormat.RAW else _int8_launch
    return move(cache, part, buffer, common)


def _raw_launch(cache: torch.Tensor, part: KVPart, buffer: torch.Tensor, common: dict[str, Any]) -> Launch:
    row_words = cache.shape[-1] * cache.element_size() // _WORD
    block_words = power_of_two(row_words)
    block_tokens = max(_WORDS_PER_PROGRAM // block_words, 1)
    arguments = common | {
        "cache": cache.view(torch.int64),
        "wire": buffer.view(torch.int64),
        "ROW_WORDS": row_words,
        "BLOCK_WORDS": block_words,
        "BLOCK_TOKENS": block_tokens,
    }
    grid = (2 * len(part.layers) * len(part.heads), cdiv(len(part.tokens), block_tokens))
    return Launch(_move_words, grid, arguments, num_warps=8, num_stages=1)


def _int8_launch(cache: torch.Tensor, part: KVPart, buffer: torch.Tensor, common: dict[str, Any]) -> Launch:
    head_dim = cache.shape[-1]
    block_dims = power_of_two(head_dim)
    block_tokens = max(_VALUES_PER_PROGRAM // block_dims, 1)
    arguments = common | {
        "cache": cache,
        "words": buffer.view(torch.int64),
        "steps": buffer.view(torch.int8),
        "scales": buffer.view(torch.float32),
        "num_value_words": part.num_rows * 2 * head_dim // _WORD,
        "HEAD_DIM": head_dim,
        "BLOCK_DIMS": block_dims,
        "BLOCK_TOKENS": block_tokens,
    }
    grid = (len(part.layers) * len(part.heads), cdiv(len(part.tokens), block_tokens))
    return Launch(_move_int8, grid, arguments, num_warps=8, num_stages=1)


@triton.jit
def _mixed(words: tl.tensor, places: tl.tensor):
    """Returns each uint64 word's contribution to the checksum, by its place (`Kernels.wire_checksum`)."""
    keyed = words ^ ((places + 1).to(tl.uint64) * _KEY_STEP)
    return words + (keyed & 0xFFFFFFFF) * (keyed >> 32)


@triton.jit
def _sum_words(words: tl.tensor, num_words: tl.tensor, total: tl.tensor, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(words + places, mask=places < num_words, other=0).to(tl.uint64)
    tl.atomic_add(
        total, tl.sum(tl.where(places < num_words, _mixed(mine, places), 0), 0).to(tl.int64), sem="relaxed"
    )


@triton.jit
def _cache_rows(
    plane: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    in_part: tl.tensor,
    block_ids: tl.tensor,
    num_blocks: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Returns the cache's rows, of D numbers each, with these tokens of a head; a plane is a layer's keys or
    its values."""
    blocks = tl.load(block_ids + tokens // BLOCK_SIZE, mask=in_part, other=0).to(tl.int64)
    return ((plane * num_blocks + blocks) * NUM_KV_HEADS + head) * BLOCK_SIZE + tokens % BLOCK_SIZE


@triton.jit(do_not_specialize=_OF_A_CHUNK)
def _move_words(
    cache: tl.tensor,
    wire: tl.tensor,
    block_ids: tl.tensor,
    total: tl.tensor,
    first_layer: tl.tensor,
    first_head: tl.tensor,
    first_token: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TO_WIRE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    plane = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    on_wire = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_part = on_wire < num_tokens
    plane_in_cache = plane.to(tl.int64) + first_layer * 2
    rows = _cache_rows(
        plane_in_cache,
        first_head + head,
        first_token + on_wire,
        in_part,
        block_ids,
        num_blocks,
        NUM_KV_HEADS,
        BLOCK_SIZE,
    )
    columns = tl.arange(0, BLOCK_WORDS)
    mask = in_part[:, None] & (columns < ROW_WORDS)[None, :]
    in_cache = rows[:, None] * ROW_WORDS + columns[None, :]
    places = (tl.program_id(0).to(tl.int64) * num_tokens + on_wire)[:, None] * ROW_WORDS + columns[None, :]
    if TO_WIRE:
        words = tl.load(cache + in_cache, mask=mask, other=0)
        tl.store(wire + places, words, mask=mask)
    else:
        words = tl.load(wire + places, mask=mask, other=0)
        tl.store(cache + in_cache, words, mask=mask)
    sums = tl.sum(tl.where(mask, _mixed(words.to(tl.uint64), places), 0), 1)
    tl.atomic_add(total, tl.sum(sums, 0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=[*_OF_A_CHUNK, "num_value_words"])
def _move_int8(
    cache: tl.tensor,
    words: tl.tensor,
    steps: tl.tensor,
    scales: tl.tensor,
    num_value_words: tl.tensor,
    block_ids: tl.tensor,
    total: tl.tensor,
    first_layer: tl.tensor,
    first_head: tl.tensor,
    first_token: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TO_WIRE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """`words`, `steps` and `scales` are the wire as int64, int8 and float32."""
    ROW_WORDS: tl.constexpr = HEAD_DIM // 8
    layer = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    on_wire = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_part = on_wire < num_tokens
    dims = tl.arange(0, BLOCK_DIMS)
    mask = in_part[:, None] & (dims < HEAD_DIM)[None, :]
    columns = tl.arange(0, BLOCK_DIMS // 8)
    word_mask = in_part[:, None] & (columns < ROW_WORDS)[None, :]
    scale_places = tl.program_id(0).to(tl.int64) * num_tokens + num_value_words + on_wire
    scale_words = tl.zeros([BLOCK_TOKENS], tl.uint64)
    sums = tl.zeros([BLOCK_TOKENS], tl.uint64)
    for side in tl.static_range(2):  # keys, values
        plane_in_cache = layer.to(tl.int64) * 2 + first_layer * 2 + side
        rows = _cache_rows(
            plane_in_cache,
            first_head + head,
            first_token + on_wire,
            in_part,
            block_ids,
            num_blocks,
            NUM_KV_HEADS,
            BLOCK_SIZE,
        )
        in_cache = cache + rows[:, None] * HEAD_DIM + dims[None, :]
        wire_rows = ((layer * 2 + side) * num_heads + head).to(tl.int64) * num_tokens + on_wire
        places = wire_rows[:, None] * ROW_WORDS + columns[None, :]
        if TO_WIRE:
            values = tl.load(in_cache, mask=mask, other=0.0).to(tl.float32)
            packed, scale = _quantise(values, dims, BLOCK_TOKENS, BLOCK_DIMS)
            tl.store(words + places, packed.to(tl.int64), mask=word_mask)
            scale_words |= scale.to(tl.uint32, bitcast=True).to(tl.uint64) << (32 * side)
        else:
            packed = tl.load(words + places, mask=word_mask, other=0).to(tl.uint64)
            scale = tl.load(scales + scale_places * 2 + side, mask=in_part, other=0.0)
            row_steps = tl.load(steps + wire_rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0)
            values = row_steps.to(tl.float32) * scale[:, None]
            tl.store(in_cache, values.to(cache.dtype.element_ty), mask=mask)
        sums += tl.sum(tl.where(word_mask, _mixed(packed, places), 0), 1)
    if TO_WIRE:
        tl.store(words + scale_places, scale_words.to(tl.int64), mask=in_part)
    else:
        scale_words = tl.load(words + scale_places, mask=in_part, other=0).to(tl.uint64)
    sums += tl.where(in_part, _mixed(scale_words, scale_places), 0)
    tl.atomic_add(total, tl.sum(sums, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _quantise(values: tl.tensor, dims: tl.tensor, BLOCK_TOKENS: tl.constexpr, BLOCK_DIMS: tl.constexpr):
    """Returns rows [BLOCK_TOKENS, BLOCK_DIMS] as (words of eight int8 steps, the size of a row's step)."""
    sizes = tl.abs(values)
    # infinite where a value is NaN, too
    largest = tl.max(tl.where(sizes < float("inf"), sizes, float("inf")), 1)
    spoilt = largest == float("inf")
    empty = largest < _SMALLEST_ROW
    divisor = tl.where(spoilt | empty, 1.0, largest)
    scale = tl.where(
        spoilt, float("nan"), tl.where(empty, 0.0, tl.div_rn(largest, tl.zeros_like(largest) + _INT8_STEPS))
    )
    inverse = tl.where(spoilt | empty, 0.0, tl.div_rn(tl.zeros_like(largest) + _INT8_STEPS, divisor))
    steps = tl.floor(tl.where(spoilt[:, None], 0.0, values) * inverse[:, None] + 0.5).to(tl.int32)
    shifted = (steps & 0xFF).to(tl.uint64) << (dims % 8 * 8)[None, :].to(tl.uint64)
    return tl.sum(tl.reshape(shifted, [BLOCK_TOKENS, BLOCK_DIMS // 8, 8]), 2), scale
