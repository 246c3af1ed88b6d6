"""The latency objectives. Goodput is the rate of requests that succeeded within every threshold
(DistServe, section 2)."""

from dataclasses import asdict, dataclass

from .errors import LoadError
from .records import RequestRecord


@dataclass(frozen=True)
class Slo:
    """Thresholds in milliseconds; None: anything is good."""

    ttft: float | None = None
    tpot: float | None = None  # the request's mean gap
    # each of the request's gaps: a stall of the stream is a miss, even if the mean is fine
    itl: float | None = None
    e2e: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """A failed request is never good; a threshold on what a request does not have (gaps of one token) is
        met."""
        if record.answer is None:
            return False
        gap_s = max(record.itl_s, default=None)
        return not self.missed(record.ttft_s, record.tpot_s, gap_s, record.e2e_s)

    def missed(
        self, ttft_s: float | None, tpot_s: float | None, gap_s: float | None, e2e_s: float | None
    ) -> list[str]:
        """Returns the names of the thresholds that a request's figures exceed; `gap_s` is its largest gap."""
        seen = (("ttft", ttft_s), ("tpot", tpot_s), ("itl", gap_s), ("e2e", e2e_s))
        limits = asdict(self)
        return [
            name
            for name, seen_s in seen
            if seen_s is not None and limits[name] is not None and seen_s * 1e3 > limits[name]
        ]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} <= {limit:g} ms" for name, limit in asdict(self).items() if limit is not None
        )


def parse_slo(text: str) -> Slo:
    """Parses `ttft=200,tpot=50`. Raises LoadError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limits[name.strip()] = float(value)
        except ValueError:
            raise LoadError(f"slo: {part!r} is not valid, expected such as ttft=200,tpot=50 (ms)") from None
    unknown = limits.keys() - {"ttft", "tpot", "itl", "e2e"}
    if unknown or not all(0 < limit < float("inf") for limit in limits.values()):
        raise LoadError(
            f"slo: {text!r} is not valid, expected ttft, tpot, itl or e2e, each with milliseconds above 0"
        )
    return Slo(**limits)
