"""Planted bugs in what holds the ranks of an instance together."""

from unittest.mock import patch

from pdserve.worker.rank_watch import RankWatch

from . import Mutation, Planted


def keep_the_instance_of_a_dead_rank() -> Planted:
    return patch.object(RankWatch, "ended", lambda self, rank: None)


def keep_the_instance_of_a_rank_that_stands_still() -> Planted:
    return patch.object(RankWatch, "beat", lambda self: None)


FIRST_FOUND: dict[Mutation, int] = {
    keep_the_instance_of_a_dead_rank: 359,
    keep_the_instance_of_a_rank_that_stands_still: 500,
}
