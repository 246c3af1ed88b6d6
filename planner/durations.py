"""How long the steps and transfers of an instance take, in the form that `core.latency` learns."""

from dataclasses import astuple, dataclass, replace

from ..core.latency import LatencyPriors, LearntLatency
from ..core.messages import StepTiming


@dataclass(frozen=True, slots=True)
class DecodeSeconds:
    """A decode step takes `step_s + context_token_s * (sum of contexts) + sequence_s * sequences`."""

    step_s: float
    context_token_s: float
    sequence_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """The speed of one instance (the form of DistServe, Zhong et al., OSDI 2024, appendix A).

    A prefill step takes `prefill_step_s + prefill_token_s * tokens + prefill_square_s * squares`; squares are
    those of `StepTiming`. From `large_batch` sequences on, decode has coefficients of its own."""

    prefill_step_s: float
    prefill_token_s: float
    prefill_square_s: float
    decode: DecodeSeconds
    decode_large: DecodeSeconds
    large_batch: int
    transfer_s: float  # from the last byte's arrival to the first step with it
    link_bytes_per_s: float  # out of the instance, and into it

    @classmethod
    def of(cls, priors: LatencyPriors) -> "Durations":
        """Returns durations that a latency model with these priors predicts exactly."""
        decode = DecodeSeconds(priors.decode_step_s, priors.decode_context_token_s, priors.decode_sequence_s)
        return cls(
            prefill_step_s=priors.prefill_step_s,
            prefill_token_s=priors.prefill_token_s,
            prefill_square_s=priors.prefill_square_s,
            decode=decode,
            decode_large=decode,
            large_batch=1,
            transfer_s=priors.transfer_s,
            link_bytes_per_s=1 / priors.transfer_byte_s,
        )

    @classmethod
    def learnt(cls, latency: LearntLatency) -> "Durations":
        """Returns durations that a latency model with these coefficients predicts."""
        return replace(
            cls.of(latency.small),
            decode_large=DecodeSeconds(*latency.decode_large),
            large_batch=latency.large_batch,
        )

    def slowed(self, prefill_factor: float, decode_factor: float) -> "Durations":
        """Returns those of an instance whose steps take so many times as long."""

        def slower(decode: DecodeSeconds) -> DecodeSeconds:
            return DecodeSeconds(*(seconds * decode_factor for seconds in astuple(decode)))

        return replace(
            self,
            prefill_step_s=self.prefill_step_s * prefill_factor,
            prefill_token_s=self.prefill_token_s * prefill_factor,
            prefill_square_s=self.prefill_square_s * prefill_factor,
            decode=slower(self.decode),
            decode_large=slower(self.decode_large),
        )

    @property
    def priors(self) -> LatencyPriors:
        """Returns the priors of a router that knows such instances before it has measured any."""
        return LatencyPriors(
            prefill_step_s=self.prefill_step_s,
            prefill_token_s=self.prefill_token_s,
            prefill_square_s=self.prefill_square_s,
            decode_step_s=self.decode.step_s,
            decode_context_token_s=self.decode.context_token_s,
            decode_sequence_s=self.decode.sequence_s,
            transfer_s=self.transfer_s,
            transfer_byte_s=1 / self.link_bytes_per_s,
        )

    def decode_s(self, num_sequences: int, num_context_tokens: float) -> float:
        """Returns the seconds of one step that decodes alone."""
        decode = self.decode if num_sequences < self.large_batch else self.decode_large
        return decode.step_s + decode.context_token_s * num_context_tokens + decode.sequence_s * num_sequences

    def step_s(self, timing: StepTiming) -> float:
        """Returns the seconds of one step. Prompts and decoding sequences of a mixed one share the weights
        that it reads."""
        num_sequences = timing.num_decode_sequences
        decode = self.decode if num_sequences < self.large_batch else self.decode_large
        seconds = decode.context_token_s * timing.num_context_tokens + decode.sequence_s * num_sequences
        if not timing.num_prefill_tokens:
            return seconds + decode.step_s
        seconds += self.prefill_token_s * timing.num_prefill_tokens
        seconds += self.prefill_square_s * timing.sum_prefill_squares
        return seconds + (max(self.prefill_step_s, decode.step_s) if num_sequences else self.prefill_step_s)
