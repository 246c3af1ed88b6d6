"""A token bucket: one client's quota of a resource per minute. Pure: the caller passes the time.

It holds a minute's worth and refills at the same rate. A larger amount is admitted when the bucket is full
and leaves it in debt, so that no permitted request waits for ever."""

SECONDS = 60.0


class TokenBucket:
    """Starts full. If the clock goes backwards, time counts as standing still."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        assert per_minute > 0
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_s = now_s

    def take(self, amount: float, now_s: float, already: float = 0.0) -> float:
        """Takes `amount`, of which `already` was taken before, and returns 0; or takes nothing more, and
        returns the seconds until all of it is available."""
        self._fill(now_s)
        missing = min(amount, self.per_minute) - self._level
        if missing > already:
            return missing * SECONDS / self.per_minute
        self._level -= amount - already
        return 0.0

    def give_back(self, amount: float, now_s: float) -> None:
        """Refunds what was taken and not used; a negative amount charges an excess unconditionally."""
        self._fill(now_s)
        self._level = min(self._level + amount, float(self.per_minute))

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._filled_s)
        self._level = min(self._level + passed_s * self.per_minute / SECONDS, float(self.per_minute))
        self._filled_s = max(self._filled_s, now_s)
