"""Transfers in parts, between the ranks of two instances."""

from unittest.mock import patch

from pdserve.kv_transfer.parted import PartedTransfer
from pdserve.kv_transfer.parts import Part, Share

from . import Mutation, Planted


def commit_with_one_part_missing() -> Planted:
    return patch.object(
        PartedTransfer,
        "is_over",
        property(lambda self: len(self._open) <= (self.failure is None and len(self._results) > 1)),
    )


def swap_heads_between_ranks() -> Planted:
    """A receiver takes the heads of one sender for those of another."""
    original = Share.received

    def received(self: Share, num_senders: int) -> tuple[Part, ...]:
        parts = original(self, num_senders)
        heads = [part.heads for part in reversed(parts)]
        return tuple(part._replace(heads=swapped) for part, swapped in zip(parts, heads, strict=True))

    return patch.object(Share, "received", received)


def free_blocks_while_other_parts_are_under_way() -> Planted:
    return patch.object(
        PartedTransfer, "is_over", property(lambda self: not self._open or self.failure is not None)
    )


FIRST_FOUND: dict[Mutation, int] = {
    commit_with_one_part_missing: 9,
    swap_heads_between_ranks: 9,
    free_blocks_while_other_parts_are_under_way: 229,
}
