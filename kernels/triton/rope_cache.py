"""Turns the packed queries, keys and values of new tokens into rotated queries and pages of the cache, in one
kernel.

A program has one token's heads that share a kv head: they take the same angles and are read once. Norms and
rotation are computed in float32 and rounded once, at the end; a token's result never depends on its batch.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, power_of_two

_ELEMENTS_PER_THREAD = 16


def rope_and_cache(
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
    """`Kernels.rope_and_cache`. Tokens of a negative slot are the padding of a captured graph: none of their
    data is read or written, and their queries are undefined."""
    _check(qkv, positions, cos_sin, q_norm, k_norm, k_cache, v_cache, slot_mapping)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if q.numel():
        rope_launch(qkv, positions, cos_sin, q_norm, k_norm, eps, k_cache, v_cache, slot_mapping, q).run()
    return q


def rope_launch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
) -> Launch:
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    block_rows, block_half = power_of_two(group + 2), power_of_two(head_dim // 2)
    arguments = {
        "qkv": qkv,
        "positions": positions,
        "cos_sin": cos_sin,
        "q_norm": qkv if q_norm is None else q_norm,
        "k_norm": qkv if k_norm is None else k_norm,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": slot_mapping,
        "q": q,
        "eps": eps,
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_ROWS": block_rows,
        "BLOCK_HALF": block_half,
        "NORMS": q_norm is not None,
    }
    num_warps = min(max(2 * block_rows * block_half // (32 * _ELEMENTS_PER_THREAD), 1), 8)
    return Launch(_rotate_and_store, (num_tokens, num_kv_heads), arguments, num_warps, num_stages=1)


def _check(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Refuses arguments that would cause reads or writes outside a tensor; the caller vouches for positions
    and slots themselves."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if v_cache.shape != k_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"v_cache: shape {tuple(v_cache.shape)} given, expected k_cache's {tuple(k_cache.shape)},"
            " contiguous"
        )
    num_heads, rest = divmod(qkv.shape[1] - 2 * num_kv_heads * head_dim, head_dim)
    if rest or num_heads < 1 or num_heads % num_kv_heads or not qkv.is_contiguous():
        raise ValueError(
            f"qkv: {qkv.shape[1]} wide, expected contiguous heads of {head_dim}, a group for each of"
            f" {num_kv_heads}"
        )
    if cos_sin.dtype != torch.float32 or cos_sin.shape[1:] != (head_dim,) or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin: {cos_sin.dtype} {tuple(cos_sin.shape)} given, expected float32 [max_pos, {head_dim}]"
        )
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        if index.dtype != torch.int64 or index.shape != qkv.shape[:1]:
            raise ValueError(
                f"{name}: {index.dtype} {tuple(index.shape)} given, expected int64 [{qkv.shape[0]}]"
            )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm: expected both norms or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (head_dim,):
            raise ValueError(f"{name}: shape {tuple(norm.shape)} given, expected [{head_dim}]")


@triton.jit
def _rotate_and_store(
    qkv: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    eps: tl.tensor,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    rows = tl.arange(0, BLOCK_ROWS)  # the group's queries, the key, the value
    is_query, is_key, is_value = rows < GROUP, rows == GROUP, rows == GROUP + 1
    plane = tl.where(is_query, kv_head * GROUP + rows, rows * NUM_KV_HEADS + kv_head)
    dims = tl.arange(0, BLOCK_HALF)
    in_half = (dims < HALF)[None, :]
    in_rows = (rows < GROUP + 2)[:, None] & in_half
    source = qkv + token * (GROUP + 2) * NUM_KV_HEADS * HEAD_DIM + (plane * HEAD_DIM)[:, None] + dims[None, :]
    first = tl.load(source, mask=in_rows, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_HALF]
    second = tl.load(source + HALF, mask=in_rows, other=0.0).to(tl.float32)

    if NORMS:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares / HEAD_DIM + eps))[:, None]
        first = first * scale * _norm_weights(q_norm, k_norm, dims, is_query, is_value, HALF)
        second = second * scale * _norm_weights(q_norm + HALF, k_norm + HALF, dims, is_query, is_value, HALF)

    angles = cos_sin + tl.load(positions + token) * HEAD_DIM + dims
    cos = tl.load(angles, mask=dims < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=dims < HALF, other=0.0)[None, :]
    turned_first = tl.where(is_value[:, None], first, first * cos - second * sin).to(q.dtype.element_ty)
    turned_second = tl.where(is_value[:, None], second, second * cos + first * sin).to(q.dtype.element_ty)

    # Each row goes to one of three places.
    to_query = q + ((token * NUM_KV_HEADS + kv_head) * GROUP + rows)[:, None] * HEAD_DIM + dims[None, :]
    page_row = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    in_page = page_row * HEAD_DIM + dims[None, :] + tl.zeros([BLOCK_ROWS, 1], tl.int32)
    _store_halves(to_query, turned_first, turned_second, is_query[:, None] & in_half, HALF)
    _store_halves(k_cache + in_page, turned_first, turned_second, is_key[:, None] & in_half, HALF)
    _store_halves(v_cache + in_page, turned_first, turned_second, is_value[:, None] & in_half, HALF)


@triton.jit
def _norm_weights(
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    dims: tl.tensor,
    is_query: tl.tensor,
    is_value: tl.tensor,
    HALF: tl.constexpr,
):
    """[rows, dims]: values keep their size."""
    of_queries = tl.load(q_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    of_keys = tl.load(k_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_query[:, None], of_queries, tl.where(is_value[:, None], 1.0, of_keys))


@triton.jit
def _store_halves(where: tl.tensor, first: tl.tensor, second: tl.tensor, mask: tl.tensor, HALF: tl.constexpr):
    tl.store(where, first, mask=mask)
    tl.store(where + HALF, second, mask=mask)
