"""The GPU kernels behind the `Kernels` interface. All work is queued on the device's current stream; calls
that must wait for it say so."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..interface import (
    AttentionBatch,
    KernelRequirements,
    PackedLinear,
    check_block_pairs,
    check_token_range,
    check_wire,
)
from ..wire import KVPart, WireFormat
from . import norm, rope_cache, transfer
from .activation import silu_mul
from .launch import INTERPRETED
from .paged_attention import MAX_GROUP, PagedAttention, to_device

_MIN_HEAD_DIM = 16  # of a matrix unit's tile
_MAX_HEAD_DIM = {
    torch.float32: 128,
    torch.bfloat16: 256,
    torch.float16: 256,
}  # more does not fit every GPU's shared memory
_CAPABILITY_NEEDED = (8, 0)
_WIRE_DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def why_unavailable(requirements: KernelRequirements) -> str | None:
    """Returns why Triton's kernels cannot serve these requirements on this machine; None where they can."""
    if requirements.dtype not in _MAX_HEAD_DIM:
        return f"{requirements.dtype} has no Triton kernels"
    limit = _MAX_HEAD_DIM[requirements.dtype]
    if not _MIN_HEAD_DIM <= requirements.head_dim <= limit:
        return (
            f"head_dim {requirements.head_dim} is not within {_MIN_HEAD_DIM} to {limit}, as"
            f" {requirements.dtype} needs"
        )
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < _CAPABILITY_NEEDED:
        return "this GPU's compute capability {}.{} is below {}.{}".format(*capability, *_CAPABILITY_NEEDED)
    return None


class TritonKernels:
    """Kernels for one model dtype, on CUDA tensors, or in Triton's interpreter on any.

    Weights, activations and the cache are on the device. Tensors that the engine makes on the host for a step
    (positions, slots and the attention batch) may stay there: they are copied without a wait. Linears are
    torch's matrix products. The last bits of a token's attention depend on its batch, which determines how
    its keys are split.
    """

    name = "triton"

    def __init__(self, requirements: KernelRequirements) -> None:
        reason = why_unavailable(requirements)
        if reason is not None:
            raise ValueError(f"kernels: 'triton' cannot run here: {reason}")
        self._dtype = requirements.dtype
        self.attention = PagedAttention()

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
        num_out, num_in = weight.shape
        return PackedLinear(num_in, num_out, weight.dtype, weight, bias)

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        num_out, num_in = gate.shape
        if up.shape != gate.shape:
            raise ValueError(f"up: shape {tuple(up.shape)} is not gate's {tuple(gate.shape)}")
        return PackedLinear(num_in, num_out, gate.dtype, torch.cat((gate, up)), None)

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Logits are not rounded to x's dtype: sums are float32, and are returned as such."""
        self._check_rows(x, packed)
        if out_dtype not in (None, self._dtype, torch.float32):
            raise ValueError(f"out_dtype: {out_dtype} is not valid, expected {self._dtype} or torch.float32")
        if out_dtype in (None, self._dtype):
            return F.linear(x, packed.weight, packed.bias)
        return self.linear_into(x, packed, x.new_empty((len(x), packed.out_features), dtype=torch.float32))

    def linear_into(self, x: torch.Tensor, packed: PackedLinear, out: torch.Tensor) -> torch.Tensor:
        """Computes `linear` in float32 into `out` [T, N]: logits have memory of their own, and are too large
        to be copied."""
        self._check_rows(x, packed)
        expected = (len(x), packed.out_features)
        if out.dtype != torch.float32 or out.shape != expected:
            raise ValueError(f"out: {out.dtype} {tuple(out.shape)} given, expected torch.float32 {expected}")
        if x.dtype == torch.float32:
            torch.mm(x, packed.weight.t(), out=out)
        elif x.device.type == "cuda":
            torch.mm(x, packed.weight.t(), out_dtype=torch.float32, out=out)
        else:  # torch's product of mixed types is CUDA's alone
            torch.mm(x.float(), packed.weight.float().t(), out=out)
        return out if packed.bias is None else out.add_(packed.bias)

    def gated_linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        self._check_rows(x, packed)
        return silu_mul(F.linear(x, packed.weight))

    def _check_rows(self, x: torch.Tensor, packed: PackedLinear) -> None:
        if self._check("x", x).shape[1] != packed.in_features:
            raise ValueError(f"x: {x.shape[1]} features, expected {packed.in_features}")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm.rms_norm(self._check("x", x), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return norm.add_rms_norm(self._check("x", x), residual, weight, eps)

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
        """Positions and slots on the host are copied at each call."""
        self._check("qkv", qkv)
        self._check_cache(k_cache, v_cache)
        positions, slots = to_device(positions, qkv.device), to_device(slot_mapping, qkv.device)
        return rope_cache.rope_and_cache(
            qkv, positions, cos_sin, q_norm, k_norm, eps, k_cache, v_cache, slots
        )

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """The batch's lengths and tables must be on the host, and stay unchanged as long as the batch exists:
        its first call plans and copies them, for all of its layers."""
        num_heads, num_kv_heads = self._check("q", q).shape[1], k_cache.shape[1]
        self._check_cache(k_cache, v_cache)
        if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
            raise ValueError(
                f"q: {num_heads} heads, expected up to {MAX_GROUP} for each of {num_kv_heads} kv heads"
            )
        return self.attention(q, k_cache, v_cache, batch, scale, sliding_window)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)  # torch promises the first of equal maxima, on every device

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
        """A buffer on the host receives the tokens through an equally large one on the device; waits for the
        device, as the checksum and the bytes must be there on return."""
        check_token_range(cache, layer_start, layer_end, block_ids, token_start, token_end, buffer)
        part = _part(cache, layer_start, layer_end, token_start, token_end)
        on_device = buffer if buffer.device == cache.device else torch.empty_like(buffer, device=cache.device)
        total = transfer.gather_part(cache, block_ids, part, on_device, WireFormat.RAW)
        if on_device is not buffer:
            buffer.copy_(on_device)
        return _unsigned(total)

    def wire_checksum(self, buffer: torch.Tensor) -> int:
        """A buffer on the host is copied to the device; waits for the device."""
        check_wire(buffer)
        return _unsigned(
            transfer.checksum(to_device(buffer, _WIRE_DEVICE) if buffer.device.type == "cpu" else buffer)
        )

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
        """A buffer on the host is copied to the device first, and may be reused on return; the cache is
        written in the order of the device's stream."""
        check_token_range(cache, layer_start, layer_end, block_ids, token_start, token_end, buffer)
        part = _part(cache, layer_start, layer_end, token_start, token_end)
        transfer.scatter_part(cache, block_ids, part, to_device(buffer, cache.device), WireFormat.RAW)

    def copy_blocks(self, cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        check_block_pairs(cache, pairs)
        for src, dst in pairs:
            cache[:, :, dst] = cache[:, :, src]

    def _check_cache(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        self._check("k_cache", k_cache)
        self._check("v_cache", v_cache)

    def _check(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != self._dtype or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise ValueError(f"{name}: {layout} {tensor.dtype} given, expected contiguous {self._dtype}")
        return tensor


def _part(cache: torch.Tensor, layer_start: int, layer_end: int, token_start: int, token_end: int) -> KVPart:
    """Returns all heads of these layers and tokens."""
    return KVPart(range(layer_start, layer_end), range(cache.shape[3]), range(token_start, token_end))


def _unsigned(total: torch.Tensor) -> int:
    return int(total.item()) & 0xFFFFFFFFFFFFFFFF
