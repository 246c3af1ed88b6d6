"""New tokens' queries are rotated, and their keys and values are written to their slots and nowhere else."""

import pytest
import torch

from pdserve.kernels.reference import TorchKernels
from pdserve.kernels.triton.rope_cache import rope_and_cache

from .support import DEVICE, assert_close_in_dtype

EPS = 1e-6
NUM_BLOCKS, NUM_POSITIONS = 4, 300
reference = TorchKernels()
CASES = [  # query heads, kv heads, head_dim, block_size
    (8, 2, 64, 16),
    (7, 1, 128, 64),
    (3, 3, 80, 24),
    (4, 2, 96, 8),
]


def random_inputs(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_tokens: int
) -> dict:
    """Arguments of `rope_and_cache`; tokens are at any positions, in any slots."""
    q_norm, k_norm = (torch.rand(2, head_dim) + 0.5).to(dtype)
    k_cache, v_cache = torch.randn(2, NUM_BLOCKS, num_kv_heads, block_size, head_dim).to(dtype)
    angles = torch.rand(NUM_POSITIONS, head_dim // 2) * 6
    return {
        "qkv": torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype),
        "positions": torch.randint(NUM_POSITIONS, (num_tokens,)),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "q_norm": q_norm,
        "k_norm": k_norm,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": torch.randperm(NUM_BLOCKS * block_size)[:num_tokens],
    }


def on_device(inputs: dict) -> dict:
    return {name: None if tensor is None else tensor.clone().to(DEVICE) for name, tensor in inputs.items()}


def wide(inputs: dict) -> dict:
    """Computes in float32, so that the reference rounds nothing before the end."""
    return {name: t.float() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), CASES)
def test_rope_and_cache(
    dtype: torch.dtype, norms: bool, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    inputs = random_inputs(dtype, num_heads, num_kv_heads, head_dim, block_size, num_tokens=5)
    if not norms:
        inputs |= {"q_norm": None, "k_norm": None}
    exact, given = wide(inputs), on_device(inputs)
    exact |= {name: inputs[name].float().clone() for name in ("k_cache", "v_cache")}
    exact_q = reference.rope_and_cache(**exact, eps=EPS)
    q = rope_and_cache(**given, eps=EPS)
    assert_close_in_dtype(q, exact_q.double())
    assert_close_in_dtype(given["k_cache"], exact["k_cache"].double())
    assert torch.equal(given["v_cache"].cpu(), exact["v_cache"].to(dtype))
    untouched = torch.ones(NUM_BLOCKS * block_size, dtype=torch.bool)
    untouched[inputs["slot_mapping"]] = False
    before, after = (
        cache.cpu().transpose(1, 2).flatten(0, 1)[untouched]
        for cache in (inputs["k_cache"], given["k_cache"])
    )
    assert torch.equal(before, after)


def test_padding_of_a_captured_graph_is_neither_read_nor_written() -> None:
    inputs = random_inputs(torch.float32, 4, 2, 64, 16, num_tokens=3)
    alone = on_device(inputs)
    q = rope_and_cache(**alone, eps=EPS)
    padded = on_device(inputs)
    rubbish = torch.full((2,), 10**12, device=DEVICE)
    padded["qkv"] = torch.cat(
        (padded["qkv"], torch.full((2, padded["qkv"].shape[1]), torch.nan, device=DEVICE))
    )
    padded["positions"] = torch.cat((padded["positions"], rubbish))
    padded["slot_mapping"] = torch.cat((padded["slot_mapping"], torch.full_like(rubbish, -1)))
    assert torch.equal(rope_and_cache(**padded, eps=EPS)[:3], q)
    assert torch.equal(padded["k_cache"], alone["k_cache"])
    assert torch.equal(padded["v_cache"], alone["v_cache"])


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"qkv": torch.zeros(3, 64 * 7)}, "qkv:"),
        ({"v_cache": torch.zeros(4, 2, 8, 64)}, "v_cache:"),
        ({"cos_sin": torch.zeros(300, 32)}, "cos_sin:"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions:"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, "slot_mapping:"),
        ({"q_norm": None}, "q_norm:"),
        ({"k_norm": torch.ones(32)}, "k_norm:"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(changed: dict, complaint: str) -> None:
    inputs = random_inputs(torch.float32, 4, 2, 64, 16, num_tokens=3)
    with pytest.raises(ValueError, match=complaint):
        rope_and_cache(**on_device(inputs | changed), eps=EPS)
