"""The kernels in plain torch: they define each operation, and run where the native library cannot."""

from collections.abc import Sequence
from math import ceil

import torch
import torch.nn.functional as F

from .interface import AttentionBatch, PackedLinear, check_block_pairs, check_token_range, check_wire

_KEY_STEP = 0x9E3779B185EBCA87 - 2**64  # torch has signed integers only
_MAX_QUERY_ROWS = 512  # per attention call: bounds the mask of a long prefill


class TorchKernels:
    """Supports any dtype, any head_dim, any CPU."""

    name = "torch"

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
        num_out, num_in = weight.shape
        return PackedLinear(num_in, num_out, weight.dtype, weight, bias)

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return F.linear(x, packed.weight, packed.bias).to(out_dtype or x.dtype)

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        num_out, num_in = gate.shape
        return PackedLinear(num_in, num_out, gate.dtype, torch.cat((gate, up)), None)

    def gated_linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return silu_mul(F.linear(x, packed.weight))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

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
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
        q = q if q_norm is None else self.rms_norm(q, q_norm, eps)
        k = k if k_norm is None else self.rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[positions][:, None, :].chunk(2, dim=-1)
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        k_cache[blocks, :, offsets] = _rotate(k, cos, sin)
        v_cache[blocks, :, offsets] = v
        return _rotate(q, cos, sin)

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        starts = batch.query_start_loc.tolist()
        for s, context_len in enumerate(batch.context_lens.tolist()):
            block_ids = batch.block_tables[s, : ceil(context_len / k_cache.shape[2])]
            k = _contiguous_keys(k_cache, block_ids, context_len)
            v = _contiguous_keys(v_cache, block_ids, context_len)
            for start in range(starts[s], starts[s + 1], _MAX_QUERY_ROWS):
                end = min(start + _MAX_QUERY_ROWS, starts[s + 1])
                num_keys = context_len - (starts[s + 1] - end)
                out[start:end] = _attend(
                    q[start:end], k[:, :num_keys], v[:, :num_keys], scale, sliding_window
                )
        return out.flatten(1)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

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
        check_token_range(cache, layer_start, layer_end, block_ids, token_start, token_end, buffer)
        wire = _wire_view(cache, layer_end - layer_start, token_end - token_start, buffer)
        blocks, offsets = _token_slots(cache, block_ids, token_start, token_end)
        # Advanced indices around a slice put the token axis first: [tokens, layers, 2, Hkv, D].
        wire.copy_(cache[layer_start:layer_end, :, blocks, :, offsets].permute(1, 2, 3, 0, 4))
        return self.wire_checksum(buffer)

    def wire_checksum(self, buffer: torch.Tensor) -> int:
        check_wire(buffer)
        words = buffer.view(torch.int64)
        keys = torch.arange(1, words.numel() + 1).mul_(_KEY_STEP)
        mixed = words ^ keys
        # int64 wraps around, as the definition does
        products = (mixed & 0xFFFFFFFF) * (mixed >> 32 & 0xFFFFFFFF)
        return int((words.sum() + products.sum()).item()) & 0xFFFFFFFFFFFFFFFF

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
        check_token_range(cache, layer_start, layer_end, block_ids, token_start, token_end, buffer)
        wire = _wire_view(cache, layer_end - layer_start, token_end - token_start, buffer)
        blocks, offsets = _token_slots(cache, block_ids, token_start, token_end)
        cache[layer_start:layer_end, :, blocks, :, offsets] = wire.permute(3, 0, 1, 2, 4)

    def copy_blocks(self, cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        check_block_pairs(cache, pairs)
        for src, dst in pairs:
            cache[:, :, dst] = cache[:, :, src]


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I], gates before ups -> silu(gate) * up [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], cos and sin [T, 1, D/2]: rotate the pairs (i, i + D/2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _contiguous_keys(cache: torch.Tensor, block_ids: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[num_blocks, Hkv, block_size, D] -> [Hkv, num_keys, D]."""
    blocks = cache[block_ids].transpose(0, 1)
    return blocks.flatten(1, 2)[:, :num_keys]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """q [n, Hq, D] are the last n positions of k and v [Hkv, num_keys, D]; returns [n, Hq, D].

    The query heads that share a key head are packed as query rows, so that keys are read once for all of
    them."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = k.shape
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    keys = torch.arange(num_keys)[None, :]
    mask = keys <= positions
    if window is not None:
        mask &= keys > positions - window
    group = num_heads // num_kv_heads
    rows = (
        q.view(num_queries, num_kv_heads, group, head_dim)
        .permute(1, 2, 0, 3)
        .reshape(1, num_kv_heads, -1, head_dim)
    )
    row_mask = None if num_queries == 1 and window is None else mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=row_mask, scale=scale)
    return out.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3).reshape(q.shape)


def _wire_view(cache: torch.Tensor, num_layers: int, num_tokens: int, buffer: torch.Tensor) -> torch.Tensor:
    """Returns the buffer as [layers, 2, Hkv, tokens, D]."""
    return buffer.view(cache.dtype).view(num_layers, 2, cache.shape[3], num_tokens, cache.shape[5])


def _token_slots(
    cache: torch.Tensor, block_ids: Sequence[int], start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (block, offset) of each token in [start, end)."""
    block_size = cache.shape[4]
    tokens = torch.arange(start, end)
    return torch.tensor(block_ids, dtype=torch.int64)[tokens // block_size], tokens % block_size
