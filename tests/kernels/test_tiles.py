"""The kernels for AMX sum in the order of the processor's tiles: on its registers, or in their model."""

import pytest
import torch

from .conftest import TILE_MODEL, make_subject


@pytest.mark.parametrize("name", ["amx", TILE_MODEL])
@pytest.mark.parametrize("num_in", [32, 96, 530, 1200])
def test_a_linear_sums_pairs_apart_in_each_tile_and_tiles_in_order(name: str, num_in: int) -> None:
    x, weight = torch.randn(19, num_in).bfloat16(), torch.randn(40, num_in).bfloat16()
    kernels = make_subject(name, torch.bfloat16).kernels
    sums = torch.zeros(19, 40)
    for start in range(0, num_in, 32):  # a tile: 16 pairs
        even, odd = torch.zeros_like(sums), torch.zeros_like(sums)
        for k in range(start, min(start + 32, num_in), 2):
            # the product of two bf16 is exact in float32, so a fused multiply-add rounds as an addition
            even += torch.outer(x[:, k].float(), weight[:, k].float())
            odd += torch.outer(x[:, k + 1].float(), weight[:, k + 1].float())
        sums += even + odd
    assert torch.equal(kernels.linear(x, kernels.pack_linear(weight), torch.float32), sums)


def test_denormals_count_as_zero_in_tiles() -> None:
    kernels = make_subject(TILE_MODEL, torch.bfloat16).kernels
    x = torch.full((1, 2), 2.0**-130).bfloat16()
    assert x.all()
    assert not kernels.linear(x, kernels.pack_linear(torch.full((1, 2), 2.0**20).bfloat16())).any()
