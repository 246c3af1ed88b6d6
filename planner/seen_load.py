"""The load of the last few horizons, as the head's summaries told of it, and its replay at a rate."""

from collections import deque
from collections.abc import Sequence

from ..router.planning import SeenRequest, Summary, Window
from .forecast import BINS_PER_HORIZON, MAX_BINS
from .virtual_cluster import Arrival


class SeenLoad:
    """The load that has come. Requests that ended before the last horizon are forgotten, and arrivals older
    than some."""

    def __init__(self) -> None:
        self._summaries: deque[Summary] = deque()
        self._requests: deque[tuple[float, SeenRequest]] = deque()  # with the summary's instant, in its order

    def add(self, summary: Summary) -> None:
        """Summaries are in order of time."""
        horizon_s = summary.terms.horizon_s
        self._summaries.append(summary)
        self._requests += ((summary.at_s, request) for request in summary.seen)
        while self._summaries[0].at_s <= summary.at_s - horizon_s * MAX_BINS / BINS_PER_HORIZON:
            self._summaries.popleft()
        while self._requests and self._requests[0][0] <= summary.at_s - horizon_s:
            self._requests.popleft()

    @property
    def seen_s(self) -> float:
        """Returns for how long arrivals have been counted."""
        return sum(summary.duration_s for summary in self._summaries)

    def rates(self) -> list[float]:
        """Returns the arrivals per second of each bin that was seen as a whole, oldest first. A summary's
        arrivals count as evenly spread."""
        if not self._summaries:
            return []
        now_s = self._summaries[-1].at_s
        bin_s = self._summaries[-1].terms.horizon_s / BINS_PER_HORIZON
        counts = [0.0] * min(MAX_BINS, int(self.seen_s / bin_s + 1e-9))
        for summary in self._summaries:
            if summary.duration_s <= 0:
                continue
            rate = summary.num_arrived / summary.duration_s
            ages_s = now_s - summary.at_s, now_s - summary.at_s + summary.duration_s
            for age in range(int(ages_s[0] / bin_s), min(len(counts), int(ages_s[1] / bin_s) + 1)):
                overlap_s = min(ages_s[1], (age + 1) * bin_s) - max(ages_s[0], age * bin_s)
                counts[age] += rate * max(0.0, overlap_s)
        return [count / bin_s for count in reversed(counts)]

    def latest(self, max_replayed: int) -> list[SeenRequest]:
        """Returns the requests that ended in the last horizon, however old they are, by arrival: those that
        came last, as many as have so many tokens of output, and tenths of those of prompts."""
        num_left = max_replayed
        kept: list[SeenRequest] = []
        for request in sorted((one for _, one in self._requests), key=lambda request: -request.at_s):
            num_left -= request.num_output_tokens + request.num_prompt_tokens // 10
            if num_left < 0:
                break
            kept.append(request)
        return kept[::-1]


def window_of(requests: Sequence[SeenRequest], rate: float, forecast_rate: float) -> Window:
    count = max(1, len(requests))
    return Window(
        num_requests=len(requests),
        rate=rate,
        forecast_rate=forecast_rate,
        mean_prompt_tokens=sum(request.num_prompt_tokens for request in requests) / count,
        mean_cached_tokens=sum(request.num_cached_tokens for request in requests) / count,
        mean_output_tokens=sum(request.num_output_tokens for request in requests) / count,
        num_clients=len({request.client for request in requests}),
    )


def arrivals(requests: Sequence[SeenRequest], rate: float, max_model_len: int) -> list[Arrival]:
    """Returns the requests with their gaps stretched to the rate. The cached prefixes of one client begin
    alike, and share nothing with those of another."""
    first_s, span_s = requests[0].at_s, requests[-1].at_s - requests[0].at_s
    stretch = (len(requests) - 1) / (rate * span_s) if span_s > 0 else 0.0
    numbers = {client: number for number, client in enumerate({request.client: None for request in requests})}
    found = []
    for index, request in enumerate(requests):
        num_tokens = max(1, min(request.num_prompt_tokens, max_model_len - 1))
        num_shared = min(request.num_cached_tokens, num_tokens)
        own = (2 * index + 1,) * (num_tokens - num_shared)
        prompt = (2 * numbers[request.client],) * num_shared + own
        num_output = max(1, min(request.num_output_tokens, max_model_len - num_tokens))
        found.append(Arrival((request.at_s - first_s) * stretch, prompt, num_output))
    return found
