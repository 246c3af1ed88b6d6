"""How the ranks of one instance combine their parts of a model's results."""

from typing import Protocol

import torch

from .shard import WHOLE, Shard


class Collectives(Protocol):
    """Every rank makes the same calls in the same order. They raise RankLost where another rank dies, stalls
    or gives up; the instance is then at its end."""

    @property
    def shard(self) -> Shard: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Replaces a contiguous x, of equal shape on all ranks, by its sum over ranks; returns it. The sum is
        taken in float32 in the order of ranks: all ranks get the same bits, in every run."""
        ...

    def gather(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Returns, on rank 0, the ranks' x [R, widths[rank]] side by side; on others x."""
        ...


class OneRank:
    """An instance of one device."""

    shard: Shard = WHOLE

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        return x


ONE_RANK = OneRank()
