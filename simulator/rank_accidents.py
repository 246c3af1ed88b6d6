"""Accidents that hit one rank of an instance: its process, its connections to other instances' ranks."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from .faults import Faults
from .network import Network
from .simulated_ranks import SimulatedRanks


class RankAccident(enum.Enum):
    """A one-off event that hits a rank other than rank 0, as far as there are any."""

    KILL = "rank killed"
    FREEZE = "rank frozen"
    CUT = "transfer connections of a rank reset"
    PART = "two ranks cut off from each other"
    ALONE = "rank cut off from its siblings"
    LATE = "rank delivers late to its siblings"


@dataclass(frozen=True)
class PlannedRankAccident:
    at_s: float
    kind: RankAccident
    draws: tuple[float, float]  # 0 to 1: select the rank, and the other one of two
    duration_s: float


def strike(
    accident: PlannedRankAccident, instances: Sequence[SimulatedRanks], faults: Faults, network: Network
) -> str | None:
    """Hits a rank other than rank 0, and returns which one; None where there is none."""
    ranks = [(rank, instance.siblings) for instance in instances for rank in instance.ranks[1:]]
    if not ranks:
        return None
    (hit, siblings), (other, _) = (ranks[int(draw * len(ranks))] for draw in accident.draws)
    faults.count(accident.kind.value)
    match accident.kind:
        case RankAccident.KILL:
            hit.process.kill()
        case RankAccident.FREEZE:
            hit.process.stand_still(accident.duration_s)
        case RankAccident.CUT:
            network.cut(hit.process)
        case RankAccident.PART:
            network.partition(hit.process.name, other.process.name, accident.duration_s)
        case RankAccident.ALONE:
            siblings.cut(hit.process, accident.duration_s)
        case RankAccident.LATE:
            siblings.delay(hit.process, accident.duration_s / 10, accident.duration_s)
    return hit.process.name
