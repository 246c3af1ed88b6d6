"""A token bucket: what one client may take of something per minute. Pure: whoever asks brings the time.

It holds a minute's worth and fills at the same rate. What is larger than that is let through when the bucket
is full, and leaves it in debt, so that nothing that is allowed at all has to wait for ever."""

SECONDS = 60.0


class TokenBucket:
    """Full at first. Time that goes back counts as time that stands still."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        assert per_minute > 0
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_s = now_s

    def take(self, amount: float, now_s: float, already: float = 0.0) -> float:
        """Take `amount`, of which `already` was taken before, and return 0; or take nothing more, and return
        after how many seconds all of it will be there."""
        self._fill(now_s)
        missing = min(amount, self.per_minute) - self._level
        if missing > already:
            return missing * SECONDS / self.per_minute
        self._level -= amount - already
        return 0.0

    def give_back(self, amount: float, now_s: float) -> None:
        """Return what was taken and not used; less than nothing takes more than was expected, without
        asking."""
        self._fill(now_s)
        self._level = min(self._level + amount, float(self.per_minute))

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._filled_s)
        self._level = min(self._level + passed_s * self.per_minute / SECONDS, float(self.per_minute))
        self._filled_s = max(self._filled_s, now_s)
