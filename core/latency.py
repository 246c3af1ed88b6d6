"""The durations of prefills, decode steps and transfers. One model for placement, admission, `explain` and
the planner.

The form is DistServe's (Zhong et al., OSDI 2024, appendix A): linear in token counts, in token products
(attention) and in bytes. Seeded with priors, refined by recursive least squares from every step and transfer
that workers report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median_low

from .histogram import RATIOS, Histogram
from .messages import StepTiming, TransferStats
from .worker_speed import Correction, WorkerSpeed

NOISE = 0.02  # variance of a measurement relative to its size
MAX_SPREAD = 4.0  # forgetting stops where the weights' variance (in units of the priors) is above this
MAX_DROPPED = 8  # this many outliers in a row are no outliers but a change
OUTLIER_RATIO = 4.0  # slower than predicted by this ratio
WARM_UP = 8  # measurements taken before any can be an outlier
FLOOR_S = 1e-9
LEAST_S = 1e-18  # a coefficient that was learnt to be 0
CENTRED = 1.05  # a median of corrections below this, and above its inverse, is left as it is


@dataclass(frozen=True, slots=True)
class LatencyPriors:
    """Coefficients before anything was measured, in seconds; all positive."""

    prefill_step_s: float = 2e-3
    prefill_token_s: float = 1e-4
    prefill_square_s: float = 1e-9  # per new_token * context
    decode_step_s: float = 2e-3
    decode_context_token_s: float = 1e-8
    decode_sequence_s: float = 1e-4
    transfer_s: float = 1e-3
    transfer_byte_s: float = 1e-9

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}: {value!r} is not valid, expected a positive number of seconds")

    @classmethod
    def roofline(
        cls,
        *,
        num_parameters: int,
        weight_bytes: int,
        kv_bytes_per_token: int,
        attention_flops_per_square: float,
        flops_per_s: float,
        memory_bytes_per_s: float,
        link_bytes_per_s: float,
        step_overhead_s: float = 1e-3,
    ) -> "LatencyPriors":
        """Priors from a machine's peak rates: prefill is bound by arithmetic, decode by reading weights and
        KV."""
        token_s = 2 * num_parameters / flops_per_s
        return cls(
            prefill_step_s=step_overhead_s,
            prefill_token_s=token_s,
            prefill_square_s=attention_flops_per_square / flops_per_s,
            decode_step_s=step_overhead_s + weight_bytes / memory_bytes_per_s,
            decode_context_token_s=kv_bytes_per_token / memory_bytes_per_s,
            decode_sequence_s=token_s,
            transfer_s=step_overhead_s,
            transfer_byte_s=1 / link_bytes_per_s,
        )


@dataclass(frozen=True, slots=True)
class LearntLatency:
    """The coefficients in use, in the form of priors; those of decode are for small batches."""

    small: LatencyPriors
    decode_large: tuple[float, float, float]  # a step, a context token, a sequence: from `large_batch` on
    large_batch: int


class RecursiveLeastSquares:
    """Non-negative coefficients of `seconds = w . features`, of two or three features, fitted online with
    forgetting.

    Works in units of the priors (each weight starts at 1) and on relative errors, so that short and long
    steps count alike. A step of every worker passes through it, so it is written out: three weights, and the
    upper half of their covariance. Of two features the third is always 0 and certain."""

    def __init__(self, priors: Sequence[float], forgetting: float) -> None:
        self._size = len(priors)
        self._priors = (*priors, 1.0)[:3]
        self._forgetting = forgetting
        self._weights = (1.0, 1.0, 1.0)
        self._num_seen = 0
        self._num_dropped_in_row = 0
        self.num_dropped = 0
        self.ratios = Histogram(RATIOS)  # measured over predicted, of all measurements
        self._covariance = self._initial_covariance()

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Seconds per unit of each feature; never negative. Of two features the third says nothing."""
        (u, v, w), (p, q, r) = self._weights, self._priors
        return u * p, v * q, w * r

    @property
    def is_warm(self) -> bool:
        """Whether it has enough measurements since the start, or since the last change in speed."""
        return self._num_seen >= WARM_UP

    def observe(
        self, x: float, y: float, z: float, seconds: float, correction: Correction | None = None
    ) -> bool:
        """Refine by one measurement of these features; False when it was dropped as an outlier. `correction`
        is the one of the worker that was measured, and learns as well, once predictions rest on
        measurements."""
        (u, v, w), (p, q, r) = self._weights, self._priors
        x, y, z = x * p, y * q, z * r
        predicted = max(x * u + y * v + z * w, FLOOR_S)
        ratio = seconds / predicted
        if correction is not None:
            ratio /= correction.factor
            if self._num_seen >= WARM_UP:
                correction.observe(ratio)
        self.ratios.add(ratio)
        if self._is_outlier(ratio):
            return False
        self._update(x / predicted, y / predicted, z / predicted, ratio)
        self._num_seen += 1
        return True

    def scale(self, factor: float) -> None:
        """Makes every prediction `factor` times as long, and as uncertain relative to itself as before."""
        u, v, w = self._weights
        self._weights = u * factor, v * factor, w * factor
        a, b, c, d, e, f = (factor * factor * entry for entry in self._covariance)
        self._covariance = a, b, c, d, e, f

    def _is_outlier(self, ratio: float) -> bool:
        """Only slow measurements are suspect: nothing computes faster by accident."""
        if not self.is_warm or ratio < OUTLIER_RATIO:
            self._num_dropped_in_row = 0
            return False
        self._num_dropped_in_row += 1
        if self._num_dropped_in_row > MAX_DROPPED:
            self._num_dropped_in_row = self._num_seen = 0
            self._covariance = self._initial_covariance()
            return False
        self.num_dropped += 1
        return True

    def _initial_covariance(self) -> tuple[float, ...]:
        """As uncertain as each weight is large, at least as its prior."""
        a, d, f = (max(1.0, weight) ** 2 for weight in self._weights)
        return a, 0.0, 0.0, d, 0.0, f if self._size == 3 else 0.0

    def _update(self, x: float, y: float, z: float, target: float) -> None:
        """One step of recursive least squares (Haykin, Adaptive Filter Theory, 10.3), then to weights >= 0,
        then forgetting: old measurements lose weight, but a direction that no measurement touches must not
        grow without bound."""
        (u, v, w), (a, b, c, d, e, f) = self._weights, self._covariance
        i, j, k = a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z  # the spread
        variance = NOISE + (x * i + y * j + z * k)
        error = target - (x * u + y * v + z * w)
        u, v, w = u + i / variance * error, v + j / variance * error, w + k / variance * error
        a, b, c = a - i * i / variance, b - i * j / variance, c - i * k / variance
        d, e, f = d - j * j / variance, e - j * k / variance, f - k * k / variance
        self._weights, self._covariance = (u, v, w), (a, b, c, d, e, f)
        if u < 0.0 or v < 0.0 or w < 0.0:
            self._leave_out_negative()
            u, v, w = self._weights
        if (
            a < MAX_SPREAD * max(1.0, u) ** 2
            and d < MAX_SPREAD * max(1.0, v) ** 2
            and f < MAX_SPREAD * max(1.0, w) ** 2
        ):
            g = self._forgetting
            self._covariance = (a / g, b / g, c / g, d / g, e / g, f / g)

    def _leave_out_negative(self) -> None:
        """The others take over what a negative weight stood for: cut off alone, it would raise every
        prediction, and grow."""
        weights = list(self._weights)
        a, b, c, d, e, f = self._covariance
        rows = (a, b, c), (b, d, e), (c, e, f)
        for _ in range(self._size):
            least = min(range(3), key=lambda i: weights[i])
            weight, variance = weights[least], rows[least][least]
            if weight >= 0.0 or variance <= 0.0:
                break
            weights = [other - rows[least][i] / variance * weight for i, other in enumerate(weights)]
            weights[least] = 0.0
        u, v, w = (max(0.0, weight) for weight in weights)
        self._weights = u, v, w


class LatencyModel:
    """Predicts from its priors and its measurements. Every prediction is positive and finite."""

    def __init__(
        self, priors: LatencyPriors | None = None, *, forgetting: float = 0.995, large_batch: int = 32
    ) -> None:
        """Decode is fitted in two ranges, below and from `large_batch` on: kernels change regime in
        between."""
        p = priors or LatencyPriors()
        decode = (p.decode_step_s, p.decode_context_token_s, p.decode_sequence_s)
        self._prefill = RecursiveLeastSquares(
            (p.prefill_step_s, p.prefill_token_s, p.prefill_square_s), forgetting
        )
        self._decode_small = RecursiveLeastSquares(decode, forgetting)
        self._decode_large = RecursiveLeastSquares(decode, forgetting)
        self._transfer = RecursiveLeastSquares((p.transfer_s, p.transfer_byte_s), forgetting)
        self._large_batch = large_batch
        self._a, self._b, self._c = self._prefill.coefficients
        self._small, self._large = self._decode_small.coefficients, self._decode_large.coefficients
        self._alpha, self._byte_s, _ = self._transfer.coefficients
        self._fastest_byte_s = inf  # of a transfer

    @property
    def knows_prefill(self) -> bool:
        """Whether predictions of prefills rest on measurements, and not on priors or on times that have
        changed since."""
        return self._prefill.is_warm

    @property
    def learnt(self) -> LearntLatency:
        """Returns the coefficients in use. A transfer shares its link with others, and waits until its target
        has room: the time of a byte is that of the fastest one, as whoever asks has both of their own."""
        byte_s = min(self._byte_s, self._fastest_byte_s)
        coefficients = (self._a, self._b, self._c, *self._small, self._alpha, byte_s)
        return LearntLatency(
            LatencyPriors(*(max(value, LEAST_S) for value in coefficients)),
            (self._large[0], self._large[1], self._large[2]),
            self._large_batch,
        )

    def prefill_s(self, num_tokens: float, sum_squares: float, num_steps: int = 1) -> float:
        """Seconds of prefill steps over `num_tokens` new ones; `sum_squares` as in `StepTiming`."""
        return self._a * num_steps + self._b * num_tokens + self._c * sum_squares + FLOOR_S

    def prompt_s(self, num_new: int, num_context: int, chunk_tokens: int) -> float:
        """Seconds to prefill `num_new` tokens behind `num_context` cached ones, in chunks of
        `chunk_tokens`."""
        full, rest = divmod(num_new, chunk_tokens)
        squares = chunk_tokens * full * num_context + chunk_tokens * chunk_tokens * full * (full + 1) // 2
        squares += rest * (num_context + num_new)
        return self._a * (full + (rest > 0)) + self._b * num_new + self._c * squares + FLOOR_S

    def decode_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """Seconds of one decode step."""
        a, b, c = self._small if num_sequences < self._large_batch else self._large
        return a + b * num_context_tokens + c * num_sequences + FLOOR_S

    def decode_delay_s(
        self, num_sequences: int, num_context_tokens: int, num_added: int, num_added_tokens: int
    ) -> float:
        """Seconds that `num_added` sequences of `num_added_tokens` take for each token at a worker that
        decodes `num_sequences` already: the step that they share, and by how much it becomes longer for each
        of the others."""
        num_then = num_sequences + num_added
        _, b, c = self._small if num_then < self._large_batch else self._large
        added_s = b * num_added_tokens + c * num_added
        return self.decode_s(num_then, num_context_tokens + num_added_tokens) + num_sequences * added_s

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds to move `num_bytes` once they are computed."""
        return self._alpha + self._byte_s * num_bytes + FLOOR_S

    def exposed_transfer_s(self, num_bytes: float, compute_s: float) -> float:
        """Seconds between the end of a prefill of `compute_s` and the moment its KV has arrived: chunks leave
        while later ones are being computed, so only what does not fit beside the compute is left."""
        return self._alpha + max(0.0, self._byte_s * num_bytes - compute_s) + FLOOR_S

    def observe_step(self, timing: StepTiming, speed: WorkerSpeed | None = None) -> None:
        """Learns from a step of a worker of that `speed`, which learns too. From a mixed one it learns the
        prefill's share: the time that the decode rows do not explain."""
        seconds, speed = timing.duration_s, speed or WorkerSpeed()
        context, sequences = timing.num_context_tokens, timing.num_decode_sequences
        if timing.num_prefill_tokens:
            if sequences:
                _, b, c = self._small if sequences < self._large_batch else self._large
                seconds -= speed.decode_factor * (b * context + c * sequences)
            if seconds > 0:
                self._prefill.observe(
                    1.0, timing.num_prefill_tokens, timing.sum_prefill_squares, seconds, speed.prefill
                )
                self._a, self._b, self._c = self._prefill.coefficients
        elif sequences and seconds > 0:
            if sequences < self._large_batch:
                self._decode_small.observe(1.0, context, sequences, seconds, speed.decode)
                self._small = self._decode_small.coefficients
            else:
                self._decode_large.observe(1.0, context, sequences, seconds, speed.decode)
                self._large = self._decode_large.coefficients

    def recentre(self, speeds: Sequence[WorkerSpeed]) -> bool:
        """Brings the median of all workers' corrections back to 1, for each kind of step; returns False when
        it was there. No prediction for one of them changes, but those for a worker that starts do.

        Where all workers take half the time predicted, their corrections learn it sooner than the model,
        which then sees nothing to learn. Of two the faster one is the median: the other may be faulty."""
        prefill = _centre([speed.prefill for speed in speeds], self._prefill)
        decode = _centre([speed.decode for speed in speeds], self._decode_small, self._decode_large)
        self._a, self._b, self._c = self._prefill.coefficients
        self._small, self._large = self._decode_small.coefficients, self._decode_large.coefficients
        return prefill or decode

    def observe_transfer(self, stats: TransferStats) -> None:
        """Learn from a transfer: what was hidden behind compute says nothing of the link, the rest does."""
        num_bytes = stats.num_bytes - stats.hidden_bytes
        if stats.exposed_s > 0:
            if num_bytes:
                self._fastest_byte_s = min(self._fastest_byte_s, stats.exposed_s / num_bytes)
            self._transfer.observe(1.0, num_bytes, 0.0, stats.exposed_s)
            self._alpha, self._byte_s, _ = self._transfer.coefficients

    def ratios(self) -> Mapping[str, tuple[Histogram, ...]]:
        """Measured over predicted time since the start, by what was measured."""
        return {
            "prefill_step": (self._prefill.ratios,),
            "decode_step": (self._decode_small.ratios, self._decode_large.ratios),
            "transfer": (self._transfer.ratios,),
        }


def _centre(corrections: Sequence[Correction], *fits: RecursiveLeastSquares) -> bool:
    """Moves the median of those that have learnt from the corrections to what they correct."""
    known = [correction for correction in corrections if correction.num_steps]
    median = median_low(correction.factor for correction in known) if known else 1.0
    if 1.0 / CENTRED < median < CENTRED:
        return False
    for correction in known:
        correction.divide(median)
    for fit in fits:
        fit.scale(median)
    return True
