"""The longest stall of an event loop: all that runs on it - heartbeats, streams - waits that long.

A timer that is due every `BEAT_S` measures how late it is called."""

from dataclasses import dataclass

BEAT_S = 0.1
# a stall is seen for at least so long, and at most twice as long: longer than scrapes are apart
WINDOW_S = 60.0


@dataclass(slots=True)
class LoopStalls:
    """Pure: the owner calls `beat` as soon after `due_s` as the loop allows."""

    due_s: float
    _window_end_s: float = 0.0
    _longest_s: float = 0.0  # in this window
    _before_s: float = 0.0  # in the one before

    def beat(self, now_s: float) -> None:
        """Records the lateness of this beat, and sets the next one."""
        if now_s >= self._window_end_s:
            self._before_s, self._longest_s = self._longest_s, 0.0
            self._window_end_s = now_s + WINDOW_S
        self._longest_s = max(self._longest_s, now_s - self.due_s)
        self.due_s = now_s + BEAT_S

    def longest_s(self, now_s: float) -> float:
        """Returns the longest stall of the last minute or two, one that lasts until now included."""
        return max(self._longest_s, self._before_s, now_s - self.due_s)
