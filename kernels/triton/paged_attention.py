"""`Kernels.paged_attention`: selects the kernels for a batch, and prepares their metadata; once a step, for
all layers.

Sequences of a few queries go to decode attention, which splits their keys, all others to prefill attention. A
batch's lengths are read on the host, where the engine makes them, and its tensors follow to the device
without a wait: nothing here synchronises with the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from ..interface import AttentionBatch
from .decode_attention import DecodeBatch, DecodeWorkspace, decode_attention, decode_workspace
from .decode_plan import MAX_QUERY_LEN, DecodePlan, DecodeShape, plan_decode
from .launch import power_of_two, target_of
from .prefill_attention import (
    PrefillBatch,
    PrefillWorkspace,
    prefill_attention,
    prefill_tile,
    prefill_workspace,
)
from .prefill_plan import PrefillPlan, plan_prefill

MAX_GROUP = 64  # query heads of a kv head: the rows of the smallest tile
# queries times their heads, packed: the most that the compile gate has verified for a decode program
_MAX_DECODE_ROWS = 64


@dataclass(frozen=True)
class _Geometry:
    """The parameters of a plan besides the batch; layers differ at most in their window."""

    num_heads: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    window: int | None


@dataclass(frozen=True)
class DecodeWork:
    """The tensors for decode attention of one batch, on the device."""

    batch: DecodeBatch
    workspace: DecodeWorkspace


@dataclass(frozen=True)
class _PrefillWork:
    """The tensors for prefill attention of one batch, on the device."""

    batch: PrefillBatch
    workspace: PrefillWorkspace | None


@dataclass(frozen=True)
class _AttentionWork:
    """A batch, divided by the kernels that its sequences go to."""

    decode: DecodeWork | None
    prefill: _PrefillWork | None


class _Plans(Protocol):
    """A batch's work by layer; layers differ at most in their window."""

    def work(self, q: torch.Tensor, k_cache: torch.Tensor, window: int | None) -> _AttentionWork: ...


class PagedAttention:
    """Holds the plans of batches that still exist, and none of the batches: a step's plan goes when its batch
    goes."""

    def __init__(self) -> None:
        self._steps: WeakKeyDictionary[AttentionBatch, _Plans] = WeakKeyDictionary()

    def adopt(self, batch: AttentionBatch, works: Mapping[int | None, DecodeWork]) -> None:
        """The batch is on the device and planned by its owner, for each window: it belongs to a captured
        graph, whose plan is overwritten step by step."""
        self._steps[batch] = _Planned(works)

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Takes the arguments of `Kernels.paged_attention`; the batch is on the host, and stays unchanged
        while it exists."""
        if not len(q):
            return q.flatten(1)
        step = self._steps.get(batch)
        if step is None:
            step = self._steps[batch] = _AttentionStep(batch, q.device)
        work = step.work(q, k_cache, window)
        out = torch.empty_like(q)
        if work.decode is not None:
            decode_attention(q, k_cache, v_cache, work.decode.batch, work.decode.workspace, scale, out)
        if work.prefill is not None:
            prefill_attention(
                q, k_cache, v_cache, work.prefill.batch, work.prefill.workspace, scale, window, out
            )
        return out.flatten(1)


@dataclass(frozen=True)
class _Planned:
    works: Mapping[int | None, DecodeWork]

    def work(self, q: torch.Tensor, k_cache: torch.Tensor, window: int | None) -> _AttentionWork:
        return _AttentionWork(self.works[window], None)


class _AttentionStep:
    """A batch on its device, and the plans that were made for it."""

    def __init__(self, batch: AttentionBatch, device: torch.device) -> None:
        for name in ("query_start_loc", "context_lens", "block_tables"):
            _check_on_host(name, getattr(batch, name))
        starts = batch.query_start_loc.tolist()
        self._query_lens = [end - start for start, end in pairwise(starts)]
        self._context_lens: list[int] = batch.context_lens.tolist()
        self._query_start_loc = to_device(batch.query_start_loc, device)
        self._context_lens_there = to_device(batch.context_lens, device)
        self._block_tables = to_device(batch.block_tables, device)
        self._device = device
        self._work: dict[_Geometry, _AttentionWork] = {}

    def work(self, q: torch.Tensor, k_cache: torch.Tensor, window: int | None) -> _AttentionWork:
        _, num_heads, head_dim = q.shape
        _, num_kv_heads, block_size, _ = k_cache.shape
        geometry = _Geometry(num_heads, num_kv_heads, block_size, head_dim, q.dtype, window)
        work = self._work.get(geometry)
        if work is None:
            most = min(MAX_QUERY_LEN, _MAX_DECODE_ROWS // (num_heads // num_kv_heads))
            few = [length if length <= most else 0 for length in self._query_lens]
            many = [length if length > most else 0 for length in self._query_lens]
            decode = self._decode(geometry, few) if any(few) else None
            work = self._work[geometry] = _AttentionWork(
                decode, self._prefill(geometry, k_cache, many) if any(many) else None
            )
        return work

    def _decode(self, geometry: _Geometry, query_lens: list[int]) -> DecodeWork:
        shape = DecodeShape(
            max_seqs=len(self._query_lens),
            max_query_len=power_of_two(
                max(query_lens)
            ),  # one kernel is compiled for each of these, not for each length
            num_kv_heads=geometry.num_kv_heads,
            block_size=geometry.block_size,
            num_multiprocessors=num_multiprocessors(self._device),
            window=geometry.window,
        )
        longest = max(self._context_lens)
        plan = plan_decode(shape, query_lens, self._context_lens, longest).trimmed()
        there = DecodePlan(
            shape, to_device(plan.pieces, self._device), to_device(plan.partial_start, self._device)
        )
        return DecodeWork(
            DecodeBatch(self._query_start_loc, self._context_lens_there, self._block_tables, there),
            decode_workspace(shape, geometry.num_heads, geometry.head_dim, longest, str(self._device)),
        )

    def _prefill(self, geometry: _Geometry, k_cache: torch.Tensor, query_lens: list[int]) -> _PrefillWork:
        target = target_of(self._device)
        tile = prefill_tile(k_cache, geometry.num_heads, geometry.window, target)
        # as a program takes a whole one
        num_programs = num_multiprocessors(self._device) // geometry.num_kv_heads
        plan = plan_prefill(
            query_lens, self._context_lens, tile.num_tokens, tile.num_keys, num_programs, geometry.window
        )
        there = PrefillPlan(
            to_device(plan.tiles, self._device),
            None if plan.pieces is None else to_device(plan.pieces, self._device),
            None if plan.partial_start is None else to_device(plan.partial_start, self._device),
        )
        batch = PrefillBatch(self._query_start_loc, self._context_lens_there, self._block_tables, there)
        return _PrefillWork(batch, prefill_workspace(there, k_cache, target))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns `tensor` itself where it is on the device, else a copy under way: from pinned memory, so that
    the host does not wait."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


def _check_on_host(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: on {tensor.device}, expected on the host, where the batch is planned")
    if tensor.dtype != torch.int32 or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise ValueError(f"{name}: {layout} {tensor.dtype} given, expected contiguous torch.int32")


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """The interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
