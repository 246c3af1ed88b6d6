"""The interface of every kernel implementation, as types only: the engine's model calls these and knows no
device.

Shapes: T tokens of a mixed batch, S sequences, Hq/Hkv query/key-value heads, D head_dim, K/N inputs/outputs
of a linear."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class KernelRequirements:
    """The model's requirements of its kernels; the implementation is chosen from them once, at start."""

    dtype: torch.dtype
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: {self.dtype} is not supported, expected float32, bfloat16 or float16")
        for name in ("head_dim", "block_size"):
            value = getattr(self, name)
            if value < 1 or value % 8:
                raise ValueError(f"{name}: {value} is not valid, expected a positive multiple of 8")


@dataclass(frozen=True, eq=False)  # compared by identity: values derived from a batch may be keyed by it
class AttentionBatch:
    """Locates each sequence's tokens and cached keys in a mixed prefill and decode batch.

    Sequence s owns the query rows `query_start_loc[s]:query_start_loc[s + 1]` (at least one); they are the
    last of its `context_lens[s]` keys. Key i of sequence s is in block `block_tables[s, i // block_size]`. A
    token's slot is `block_id * block_size + offset`."""

    query_start_loc: torch.Tensor  # int32 [S + 1]
    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, max_blocks]; entries past a sequence's last block are ignored
    slot_mapping: torch.Tensor  # int64 [T]


@dataclass(frozen=True)
class PackedLinear:
    """A linear's weights in the layout of the implementation that packed them; opaque to all other code."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    weight: torch.Tensor
    bias: torch.Tensor | None


class Kernels(Protocol):
    """All operations of a decoder-only transformer over a paged KV cache.

    The cache is one contiguous tensor [num_layers, 2, num_blocks, Hkv, block_size, D]; `k_cache` and
    `v_cache` are `cache[layer, 0]` and `cache[layer, 1]`. Activations, weights and cache share one dtype and
    are contiguous. A call returns fresh tensors and never keeps its arguments, save for the packed weights.
    """

    name: str

    def set_num_threads(self, num_threads: int) -> None:
        """Sets how many threads a call may use from now on, the caller's included; process-wide, torch's own
        included."""
        ...

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
        """Lays out a weight [N, K] and bias [N] for `linear`; the originals may be dropped."""
        ...

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Maps x [T, K] -> [T, N] in x's dtype, or in float32 where `out_dtype` says so (logits)."""
        ...

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        """Lays out the two weights [I, K] of a gated MLP for `gated_linear`."""
        ...

    def gated_linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """x [T, K] -> silu(x @ gate.T) * (x @ up.T) [T, I]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [T, H] -> [T, H]; the mean square is taken in float32."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual [T, H] += x [T, H] in place; returns the norm of the new residual."""
        ...

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
        """Rotates queries and keys (half rotation, like Hugging Face) and writes keys and values to the
        cache.

        qkv [T, (Hq + 2 Hkv) * D], positions int64 [T], cos_sin float32 [max_pos, D]: D/2 cosines then D/2
        sines; q_norm and k_norm [D]: per-head RMS norms applied before the rotation (both or neither);
        slot_mapping int64 [T]. Returns the queries [T, Hq, D]."""
        ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of q [T, Hq, D] over cached keys, new ones included -> [T, Hq * D].

        With a sliding window w, the query at position p sees keys p - w + 1 to p.
        """
        ...

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """logits float32 [S, V] -> int64 [S]; the first of equal maxima."""
        ...

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
        """Copies tokens [token_start, token_end) of the sequence stored in `block_ids`, of layers
        [layer_start, layer_end), to `buffer`, uint8 [exactly the bytes needed], laid out [layers, 2, Hkv,
        tokens, D]: the wire knows no blocks. Block i of the sequence holds its tokens from i * block_size on.
        `cache` may be `heads_of` a cache: only those travel. Returns the buffer's `wire_checksum`."""
        ...

    def wire_checksum(self, buffer: torch.Tensor) -> int:
        """Returns 64 bits of `buffer`, uint8 [a multiple of 8 bytes], the same from every implementation.

        The sum, modulo 2^64, over the little-endian 64-bit words w_i, of w_i + low32(m_i) * high32(m_i),
        where m_i is w_i xor (i + 1) * 0x9E3779B185EBCA87: XXH3's accumulation (a word, and the product of its
        keyed halves: NH, Black et al., "UMAC", 1999), with keys by position, so that it can be taken in any
        order and while bytes are copied."""
        ...

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
        """The inverse of `gather_tokens`; writes no slot outside the given tokens."""
        ...

    def copy_blocks(self, cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block src to block dst in every layer, for each (src, dst) in order: copy-on-write."""
        ...


def heads_of(cache: torch.Tensor, heads: range) -> torch.Tensor:
    """Returns the view of some neighbouring KV heads of a cache. Raises ValueError for heads that it does not
    have."""
    if not 0 <= heads.start < heads.stop <= cache.shape[3] or heads.step != 1:
        raise ValueError(f"heads: {heads} is not within the cache's {cache.shape[3]} heads")
    return cache[:, :, :, heads.start : heads.stop]


def token_range_bytes(cache: torch.Tensor, num_layers: int, num_tokens: int) -> int:
    """Returns the bytes on the wire for `num_tokens` tokens of `num_layers` layers."""
    _, _, _, num_kv_heads, _, head_dim = cache.shape
    return num_layers * 2 * num_kv_heads * num_tokens * head_dim * cache.element_size()


def check_token_range(
    cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: Sequence[int],
    token_start: int,
    token_end: int,
    buffer: torch.Tensor,
) -> None:
    """Refuses a transfer that would touch memory outside the cache or the buffer."""
    check_cells(cache, layer_start, layer_end, block_ids, token_start, token_end)
    check_buffer(buffer, token_range_bytes(cache, layer_end - layer_start, token_end - token_start))


def check_cells(
    cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: Sequence[int],
    token_start: int,
    token_end: int,
) -> None:
    """Refuses layers and tokens that the cache does not have."""
    num_layers, _, num_blocks, _, block_size, _ = cache.shape
    if not 0 <= layer_start < layer_end <= num_layers:
        raise ValueError(
            f"layers: [{layer_start}, {layer_end}) is not within the cache's {num_layers} layers"
        )
    if not 0 <= token_start < token_end <= len(block_ids) * block_size:
        raise ValueError(
            f"tokens: [{token_start}, {token_end}) is not within {len(block_ids)} blocks of {block_size}"
        )
    touched = block_ids[token_start // block_size : (token_end - 1) // block_size + 1]
    if min(touched) < 0 or max(touched) >= num_blocks:
        raise ValueError(f"block_ids: {list(touched)} are not all within the cache's {num_blocks} blocks")


def check_buffer(buffer: torch.Tensor, num_bytes: int) -> None:
    """Refuses a buffer that is not of that size."""
    if (
        buffer.dtype != torch.uint8
        or buffer.dim() != 1
        or buffer.numel() != num_bytes
        or not buffer.is_contiguous()
    ):
        raise ValueError(
            f"buffer: {buffer.dtype} {tuple(buffer.shape)} given, expected contiguous uint8 [{num_bytes}]"
        )


def check_wire(buffer: torch.Tensor) -> None:
    """Refuses a buffer that has no checksum."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() % 8 or not buffer.is_contiguous():
        raise ValueError(
            f"buffer: {buffer.dtype} {tuple(buffer.shape)} given, expected contiguous uint8 [a multiple of 8]"
        )


def check_block_pairs(cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Refuses a copy from or to a block that the cache does not have."""
    num_blocks = cache.shape[2]
    for src, dst in pairs:
        if not (0 <= src < num_blocks and 0 <= dst < num_blocks):
            raise ValueError(f"pairs: ({src}, {dst}) is not within the cache's {num_blocks} blocks")
