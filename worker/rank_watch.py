"""Decides when a rank of an instance has to end since another one is lost: it has ended, or stands still.

Time is counted in beats of this process, as in `step_watch`: while the whole host is suspended, none pass.
Pure: both the process and the simulator call it."""

from collections.abc import Iterable

from ..core.messages import HEARTBEAT_S

MAX_SILENT_BEATS = 6


class RankWatch:
    """Watches the ranks that this one is connected to: rank 0 watches all others, and each of them rank 0.
    Each call that returns a text says why the instance is over."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.is_leaving = False  # the instance ends in order: nothing is a loss any more
        self._num_silent_beats = dict.fromkeys(ranks, 0)

    def heard(self, rank: int) -> None:
        """A message of any kind has arrived."""
        self._num_silent_beats[rank] = 0

    def ended(self, rank: int) -> str | None:
        """The connection to a rank is closed."""
        return None if self.is_leaving else f"rank {rank} has ended"

    def beat(self) -> str | None:
        """Called every `HEARTBEAT_S`."""
        if self.is_leaving:
            return None
        for rank, num_beats in self._num_silent_beats.items():
            if num_beats >= MAX_SILENT_BEATS:
                return f"rank {rank} has been silent for {MAX_SILENT_BEATS * HEARTBEAT_S:g} s"
            self._num_silent_beats[rank] = num_beats + 1
        return None
