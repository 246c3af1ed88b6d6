"""The native library behind the `Kernels` interface: checks its arguments, then passes raw pointers to C++.

ctypes releases the GIL for the length of every call. The library holds the kernels once for each level of
instruction set; `levels` chooses one of them.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from .interface import (
    AttentionBatch,
    KernelRequirements,
    PackedLinear,
    check_block_pairs,
    check_token_range,
    check_wire,
)
from .levels import LevelLibrary

_NO_WINDOW = 1 << 62
_PANEL = 32  # output features; `native/panel.h` has the layout
_GATED_PANEL = 16
_DEPTH_TILE = 16  # dwords


class NativeKernels:
    """The kernels of one level of instruction set, for one model dtype, float32 or bfloat16.

    The sums of every operation are taken in one order, whatever the batch: equal inputs give equal bits on
    all machines that run the same level."""

    def __init__(self, requirements: KernelRequirements, library: LevelLibrary) -> None:
        self.name = library.level
        self._dtype = requirements.dtype
        self._bf16 = int(self._dtype == torch.bfloat16)
        self._per_dword = 2 if self._bf16 else 1
        self._c = library.functions

    def set_num_threads(self, num_threads: int) -> None:
        # its threads spin for milliseconds after each operation, on the cores that ours need
        torch.set_num_threads(1)
        self._c.set_num_threads(num_threads)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
        num_out, num_in = weight.shape
        packed = self._pack(weight, None, _PANEL)
        if bias is None:
            return PackedLinear(num_in, num_out, weight.dtype, packed, None)
        wide = torch.zeros(_round_up(num_out, _PANEL))
        wide[:num_out] = bias
        return PackedLinear(num_in, num_out, weight.dtype, packed, wide)

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        num_out, num_in = gate.shape
        if up.shape != gate.shape:
            raise ValueError(f"up: shape {tuple(up.shape)} is not gate's {tuple(gate.shape)}")
        return PackedLinear(num_in, num_out, gate.dtype, self._pack(gate, up, _GATED_PANEL), None)

    def _pack(self, weight: torch.Tensor, up: torch.Tensor | None, outputs_per_panel: int) -> torch.Tensor:
        num_out, num_in = weight.shape
        if num_in % self._per_dword:
            raise ValueError(f"weight: {num_in} input features, expected a multiple of {self._per_dword}")
        depth = num_in // self._per_dword
        num_panels = -(-num_out // outputs_per_panel)
        packed = torch.empty(num_panels * _round_up(depth, _DEPTH_TILE) * _PANEL, dtype=torch.int32)
        weight = self._check("weight", weight.contiguous())
        up = None if up is None else self._check("up", up.contiguous())
        self._c.pack_linear(_pointer(weight), _pointer(up), num_out, depth, _pointer(packed))
        return packed

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self._linear(x, packed, out_dtype or self._dtype, 0)

    def gated_linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self._linear(x, packed, self._dtype, 1)

    def _linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype, gated: int
    ) -> torch.Tensor:
        num_tokens, num_in = self._check("x", x).shape
        if num_in != packed.in_features:
            raise ValueError(f"x: {num_in} features, expected {packed.in_features}")
        if out_dtype not in (self._dtype, torch.float32):
            raise ValueError(f"out_dtype: {out_dtype} is not valid, expected {self._dtype} or torch.float32")
        out = torch.empty((num_tokens, packed.out_features), dtype=out_dtype)
        self._c.linear(
            self._bf16,
            int(out_dtype == torch.bfloat16),
            gated,
            x.data_ptr(),
            packed.weight.data_ptr(),
            _pointer(packed.bias),
            out.data_ptr(),
            num_tokens,
            num_in // self._per_dword,
            packed.out_features,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if residual.shape != x.shape:
            raise ValueError(f"residual: shape {tuple(residual.shape)} is not x's {tuple(x.shape)}")
        return self._norm(x, self._check("residual", residual), weight, eps)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_tokens, width = self._check("x", x).shape
        if self._check("weight", weight).numel() != width:
            raise ValueError(f"weight: {weight.numel()} elements, expected {width}")
        out = torch.empty_like(x)
        self._c.rms_norm(
            self._bf16,
            x.data_ptr(),
            _pointer(residual),
            weight.data_ptr(),
            out.data_ptr(),
            num_tokens,
            width,
            eps,
        )
        return out

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        _, num_kv_heads, block_size, head_dim = self._check("k_cache", k_cache).shape
        num_tokens, width = self._check("qkv", qkv).shape
        num_heads = width // head_dim - 2 * num_kv_heads
        _check_index("positions", positions, torch.int64)
        _check_index("slot_mapping", slot_mapping, torch.int64)
        _check_index("cos_sin", cos_sin, torch.float32)
        q = torch.empty((num_tokens, num_heads, head_dim), dtype=self._dtype)
        self._c.rope_and_cache(
            self._bf16,
            qkv.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            _pointer(q_norm),
            _pointer(k_norm),
            eps,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            q.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
        )
        return q

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        num_tokens, num_heads, head_dim = self._check("q", q).shape
        _, num_kv_heads, block_size, _ = self._check("k_cache", k_cache).shape
        _check_index("query_start_loc", batch.query_start_loc, torch.int32)
        _check_index("context_lens", batch.context_lens, torch.int32)
        num_seqs, max_blocks = _check_index("block_tables", batch.block_tables, torch.int32).shape
        out = torch.empty((num_tokens, num_heads * head_dim), dtype=self._dtype)
        self._c.paged_attention(
            self._bf16,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            batch.query_start_loc.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            num_seqs,
            max_blocks,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            _NO_WINDOW if sliding_window is None else sliding_window,
            scale,
        )
        return out

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        num_rows, width = _check_index("logits", logits, torch.float32).shape
        out = torch.empty(num_rows, dtype=torch.int64)
        self._c.argmax(logits.data_ptr(), out.data_ptr(), num_rows, width)
        return out

    def gather_tokens(
        self,
        cache: torch.Tensor,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        buffer: torch.Tensor,
    ) -> int:
        where = _token_range(
            cache, range(layer_start, layer_end), block_ids, range(token_start, token_end), buffer
        )
        return int(self._c.gather_tokens(*where))

    def wire_checksum(self, buffer: torch.Tensor) -> int:
        check_wire(buffer)
        return int(self._c.wire_checksum(buffer.data_ptr(), buffer.numel()))

    def scatter_tokens(
        self,
        cache: torch.Tensor,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        buffer: torch.Tensor,
    ) -> None:
        where = _token_range(
            cache, range(layer_start, layer_end), block_ids, range(token_start, token_end), buffer
        )
        self._c.scatter_tokens(*where)

    def copy_blocks(self, cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        check_block_pairs(cache, pairs)
        num_layers, _, num_blocks, _, _, _ = cache.shape
        flat = (ctypes.c_int64 * (2 * len(pairs)))(*(block for pair in pairs for block in pair))
        block_bytes = cache.stride(2) * cache.element_size()
        self._c.copy_blocks(cache.data_ptr(), 2 * num_layers, num_blocks, block_bytes, flat, len(pairs))

    def _check(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _check_index(name, tensor, self._dtype)


def _check_index(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise ValueError(f"{name}: {layout} {tensor.dtype} given, expected contiguous {dtype}")
    return tensor


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _token_range(
    cache: torch.Tensor, layers: range, block_ids: Sequence[int], tokens: range, buffer: torch.Tensor
) -> tuple[Any, ...]:
    """Returns the arguments for C++; only of the blocks touched, so that a chunk of a long sequence costs no
    more than one of a short sequence."""
    check_token_range(cache, layers.start, layers.stop, block_ids, tokens.start, tokens.stop, buffer)
    _, _, num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    start = cache.data_ptr() + layers.start * cache.stride(0) * cache.element_size()
    num_held = cache.stride(2) // cache.stride(3)  # heads of a block, of which these are neighbours
    row_bytes = head_dim * cache.element_size()
    planes = (2 * len(layers), num_blocks, num_held, num_kv_heads, block_size, row_bytes)
    first = tokens.start // block_size
    touched = block_ids[first : -(-tokens.stop // block_size)]
    ids, skipped = (ctypes.c_int64 * len(touched))(*touched), first * block_size
    return start, buffer.data_ptr(), *planes, ids, tokens.start - skipped, tokens.stop - skipped
