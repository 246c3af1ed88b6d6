"""The parts of a transfer between two instances: which rank of the one sends which KV heads to which rank of
the other.

A rank holds neighbouring heads; where an instance has more ranks than the model has KV heads, several ranks
hold the same one. Each rank that receives gets each of its heads exactly once."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Part(NamedTuple):
    """The heads that one rank sends to another one."""

    sender: int
    receiver: int
    heads: range  # of the model's


@dataclass(frozen=True)
class Share:
    """A rank's share of its instance's KV. Raises ValueError for a number of ranks by which the heads, or
    which by the heads, cannot be divided."""

    rank: int
    num_ranks: int
    num_kv_heads: int  # of the model

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank: {self.rank} is not valid, expected 0 to {self.num_ranks - 1}")
        if self.num_kv_heads % self.num_ranks and self.num_ranks % self.num_kv_heads:
            raise ValueError(
                f"num_ranks: {self.num_ranks} is not valid, expected a divisor or a multiple of"
                f" {self.num_kv_heads} KV heads"
            )

    @property
    def heads(self) -> range:
        """The heads that the rank holds."""
        num_held = max(1, self.num_kv_heads // self.num_ranks)
        first = self.rank * self.num_kv_heads // self.num_ranks
        return range(first, first + num_held)

    def sent(self, num_receivers: int) -> tuple[Part, ...]:
        """Returns the parts that this rank sends to an instance of so many ranks; perhaps none."""
        every = parts(self.num_kv_heads, self.num_ranks, num_receivers)
        return tuple(part for part in every if part.sender == self.rank)

    def received(self, num_senders: int) -> tuple[Part, ...]:
        """Returns the parts that this rank receives from an instance of so many ranks."""
        every = parts(self.num_kv_heads, num_senders, self.num_ranks)
        return tuple(part for part in every if part.receiver == self.rank)


@lru_cache(maxsize=256)
def parts(num_kv_heads: int, num_senders: int, num_receivers: int) -> tuple[Part, ...]:
    """Returns the parts of every transfer between instances of so many ranks, in the order of their senders.
    The first is always that from rank 0 to rank 0. Ranks that hold the same head share its receivers
    evenly. Raises ValueError as `Share` does."""
    senders = [Share(rank, num_senders, num_kv_heads).heads for rank in range(num_senders)]
    receivers = [Share(rank, num_receivers, num_kv_heads).heads for rank in range(num_receivers)]
    moved: dict[tuple[int, int], range] = {}
    for head in range(num_kv_heads):
        holders = [rank for rank, heads in enumerate(senders) if head in heads]
        takers = [rank for rank, heads in enumerate(receivers) if head in heads]
        for index, taker in enumerate(takers):
            pair = holders[index * len(holders) // len(takers)], taker
            first = moved[pair].start if pair in moved else head
            moved[pair] = range(first, head + 1)
    return tuple(
        Part(sender, receiver, heads) for (sender, receiver), heads in sorted(moved.items(), key=_ranks)
    )


def _ranks(item: tuple[tuple[int, int], range]) -> tuple[int, int]:
    return item[0]
