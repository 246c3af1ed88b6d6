from collections.abc import Iterator

import pytest
import torch

from pdserve.kernels.levels import LIBRARY_PATH

from .rank_pool import RankPool


@pytest.fixture(scope="package")
def pool() -> Iterator[RankPool]:
    if not LIBRARY_PATH.exists():
        pytest.skip("there are no native kernels")
    torch.set_num_threads(1)
    ranks = RankPool()
    yield ranks
    ranks.close()
