"""TritonKernels: the batches that its attention accepts, the plans that it reuses, and the arguments that it
refuses."""

import dataclasses
from typing import Any

import pytest
import torch

from pdserve.kernels import AttentionBatch, KernelRequirements
from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton import paged_attention
from pdserve.kernels.triton.decode_plan import plan_decode
from pdserve.kernels.triton.kernels import TritonKernels

from ..conftest import halves, paged_batch
from .support import DEVICE, assert_close_in_dtype, random_case

reference = TorchKernels()


def make_kernels(dtype: torch.dtype = torch.float32) -> TritonKernels:
    return TritonKernels(KernelRequirements(dtype, head_dim=16, block_size=16))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (32, 2), (64, 1)])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 4, 2], [8, 1, 3], [9, 1, 1], [1, 16, 2]])
@pytest.mark.parametrize("window", [None, 20])
def test_short_and_mixed_batches_of_small_and_large_groups(
    num_heads: int, num_kv_heads: int, query_lens: list[int], window: int | None
) -> None:
    batch, q, cache = random_case(torch.float32, num_heads, num_kv_heads, 16, 16, (query_lens, [40, 17, 90]))
    out = make_kernels().paged_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), batch, 0.25, window)
    assert_close_in_dtype(
        out, reference.paged_attention(q.double(), *halves(cache.double()), batch, 0.25, window)
    )


@pytest.mark.parametrize("window", [None, 500])
def test_a_few_tokens_behind_a_prefix_use_the_whole_gpu(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "num_multiprocessors", lambda device: 20)
    plans: list[Any] = []
    plan_prefill = paged_attention.plan_prefill  # type: ignore[attr-defined]
    monkeypatch.setattr(
        paged_attention, "plan_prefill", lambda *args: plans.append(plan_prefill(*args)) or plans[-1]
    )
    batch, q, cache = random_case(torch.float32, 4, 2, 16, 16, ([12, 1], [900, 60]))
    out = make_kernels().paged_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), batch, 0.25, window)
    assert_close_in_dtype(
        out, reference.paged_attention(q.double(), *halves(cache.double()), batch, 0.25, window)
    )
    (plan,) = plans
    assert len(plan.pieces) > len(plan.tiles) == 1


def test_positions_and_slots_may_be_on_the_host() -> None:
    batch, num_blocks = paged_batch([2], [9], 16)
    qkv, cos_sin, cache = torch.randn(2, 64), torch.rand(9, 16), torch.zeros(2, num_blocks, 1, 16, 16)
    there, written = cache.to(DEVICE), cache.clone()
    positions = torch.tensor([7, 8])
    q = make_kernels().rope_and_cache(
        qkv.to(DEVICE), positions, cos_sin.to(DEVICE), None, None, 1e-6, *halves(there), batch.slot_mapping
    )
    exact = reference.rope_and_cache(
        qkv, positions, cos_sin, None, None, 1e-6, *halves(written), batch.slot_mapping
    )
    assert_close_in_dtype(q, exact.double())
    assert_close_in_dtype(there, written.double())


def test_a_batch_is_planned_once_for_all_layers_of_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int | None] = []
    monkeypatch.setattr(
        paged_attention,
        "plan_decode",
        lambda shape, *rest: plans.append(shape.window) or plan_decode(shape, *rest),
    )
    kernels = make_kernels()
    batch, q, cache = random_case(torch.float32, 2, 1, 16, 16, ([1, 1], [20, 40]))
    q, cache = q.to(DEVICE), cache.to(DEVICE)
    whole, windowed = (
        kernels.paged_attention(q, *halves(cache), batch, 0.25, window) for window in (None, 8)
    )
    assert not torch.equal(whole, windowed)
    for window, out in ((None, whole), (8, windowed)):
        assert torch.equal(kernels.paged_attention(q, *halves(cache), batch, 0.25, window), out)
    assert plans == [None, 8]
    same = dataclasses.replace(batch)
    assert torch.equal(kernels.paged_attention(q, *halves(cache), same, 0.25, None), whole)
    assert plans == [None, 8, None]


def test_a_plan_goes_with_its_batch() -> None:
    kernels = make_kernels()
    batch, q, cache = random_case(torch.float32, 2, 1, 16, 16, ([1], [20]))
    kernels.paged_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), batch, 0.25)
    assert len(kernels.attention._steps) == 1
    del batch
    assert len(kernels.attention._steps) == 0


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("name", ["query_start_loc", "context_lens", "block_tables"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (torch.Tensor.long, "int64"),
        (strided, "strided"),
        (lambda tensor: tensor.to("meta"), "on meta, expected on the host"),
    ],
)
def test_a_batch_that_cannot_be_planned_is_refused(name: str, change: object, complaint: str) -> None:
    batch, q, cache = random_case(torch.float32, 2, 1, 16, 16, ([1, 1], [20, 40]))
    changed: AttentionBatch = dataclasses.replace(batch, **{name: change(getattr(batch, name))})  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"{name}: .*{complaint}"):
        make_kernels().paged_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), changed, 0.25)


def test_operations_refuse_arguments_they_would_misread() -> None:
    kernels = make_kernels(torch.bfloat16)
    packed = kernels.pack_linear(torch.randn(32, 64).bfloat16())
    gate_up = kernels.pack_gate_up(*torch.randn(2, 32, 64).bfloat16())
    for x in (torch.randn(2, 64), strided(torch.randn(2, 64).bfloat16()), torch.randn(2, 62).bfloat16()):
        for call, weights in ((kernels.linear, packed), (kernels.gated_linear, gate_up)):
            with pytest.raises(ValueError, match="x:"):
                call(x, weights)
    with pytest.raises(ValueError, match="out_dtype:"):
        kernels.linear(torch.randn(2, 64).bfloat16(), packed, torch.float16)
    for out in (torch.empty(2, 32).bfloat16(), torch.empty(2, 31)):
        with pytest.raises(ValueError, match="out:"):
            kernels.linear_into(torch.randn(2, 64).bfloat16(), packed, out)
    with pytest.raises(ValueError, match="up:"):
        kernels.pack_gate_up(torch.randn(32, 64), torch.randn(31, 64))
    with pytest.raises(ValueError, match="x:"):
        kernels.rms_norm(torch.randn(2, 64), torch.randn(64), 1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 2), (65, 1)])
def test_groups_too_large_for_a_tile_are_refused(num_heads: int, num_kv_heads: int) -> None:
    batch, q, cache = random_case(torch.float32, num_heads, num_kv_heads, 16, 16, ([1], [20]))
    with pytest.raises(ValueError, match="q:"):
        make_kernels().paged_attention(q.to(DEVICE), *halves(cache.to(DEVICE)), batch, 0.25)
