"""How often the planner decides: its share of a core is bounded, in the mean."""

SHARE = 0.05  # of a core
MAX_SAVED_S = 10.0  # of processor time, for decisions in a row


class Pace:
    """Processor time that was saved, and is spent by decisions."""

    def __init__(self) -> None:
        self._saved_s = MAX_SAVED_S
        self._at_s: float | None = None

    def allows(self, now_s: float) -> bool:
        """Whether a decision may be made now; `now_s` never decreases."""
        if self._at_s is not None:
            self._saved_s = min(MAX_SAVED_S, self._saved_s + SHARE * (now_s - self._at_s))
        self._at_s = now_s
        return self._saved_s > 0

    def spend(self, cpu_s: float) -> None:
        self._saved_s -= cpu_s
