"""The observations of one request, and the figures derived from them alone.

Instants are seconds of the generator's clock. Definitions, beside those of vLLM (`vllm bench serve`),
GuideLLM and aiperf:

| here | is | vLLM | GuideLLM | aiperf |
|---|---|---|---|---|
| TTFT | sent -> first token seen | TTFT | time to first token | time to first token |
| TPOT | (last token - first token) / (tokens - 1) | TPOT | inter-token latency | inter token latency |
| ITL | gap between two chunks of tokens, all requests' together | ITL | - | inter chunk latency |
| E2E | sent -> last token seen | E2EL | request latency | request latency |
| tokens/s/user | 1 / TPOT | - | - | output token throughput per user |

GuideLLM's "time per output token" is something else: E2E / tokens. Where each chunk holds one token, a
request's ITLs have its TPOT as mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class TokenChunk:
    """Tokens that came together."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True)
class Legs:
    """The parts of the time up to the second token, by the server's own timeline. In seconds; None: not
    reported.

    TTFT = queue + worker queue + prefill + `way`, which is all the rest: client, gateway, and to the worker
    and back."""

    queue_s: float  # in the router, earlier attempts included
    worker_queue_s: float | None  # in the prefill worker
    prefill_s: float | None  # from the first step to the first token
    first_token_s: float  # by the router's clock, since it took the request
    transfer_s: float | None  # moving KV, in all
    exposed_s: float | None  # the part of it that came after the prefill


@dataclass(frozen=True)
class CompletedRequest:
    """The result of a successful request."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None = None
    legs: Legs | None = None


@dataclass(frozen=True)
class RequestRecord:
    """One request of a load; `answer` or `error` is there, never both."""

    index: int
    due_s: float | None
    sent_s: float
    ended_s: float
    num_prompt_tokens: int
    chunks: tuple[TokenChunk, ...] = ()
    answer: CompletedRequest | None = None
    error: str | None = None  # a kind, see `RequestFailed`
    message: str = ""

    @property
    def lateness_s(self) -> float | None:
        """The delay of sending after the due time: the generator's fault, never the server's."""
        return None if self.due_s is None else max(0.0, self.sent_s - self.due_s)

    @property
    def num_output_tokens(self) -> int:
        """The server's count where it reports one."""
        return (
            self.answer.num_output_tokens
            if self.answer is not None
            else sum(chunk.num_tokens for chunk in self.chunks)
        )

    @property
    def ttft_s(self) -> float | None:
        return self.chunks[0].at_s - self.sent_s if self.chunks else None

    @property
    def e2e_s(self) -> float | None:
        return self.chunks[-1].at_s - self.sent_s if self.chunks else None

    @property
    def tpot_s(self) -> float | None:
        """The time per output token; None for a single token."""
        if not self.chunks or self.num_output_tokens < 2:
            return None
        return (self.chunks[-1].at_s - self.chunks[0].at_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(later.at_s - earlier.at_s for earlier, later in pairwise(self.chunks))

    @property
    def way_s(self) -> float | None:
        """The part of TTFT outside the server's named legs."""
        legs = None if self.answer is None else self.answer.legs
        if legs is None or self.ttft_s is None or legs.worker_queue_s is None or legs.prefill_s is None:
            return None
        return self.ttft_s - legs.queue_s - legs.worker_queue_s - legs.prefill_s

    @property
    def first_decode_s(self) -> float | None:
        """The time from first to second token, less the transfer's part not hidden behind the prefill."""
        if self.answer is None or self.answer.legs is None or len(self.chunks) < 2:
            return None
        return max(0.0, self.itl_s[0] - (self.answer.legs.exposed_s or 0.0))


@dataclass(frozen=True)
class GeneratorLoad:
    """The generator's own utilization during a load."""

    cpu_s: float  # CPU time of its process
    wall_s: float
    loop_lags_s: tuple[float, ...]  # by how much a timer of its loop came late, over and over

    @staticmethod
    def together(loads: "Sequence[GeneratorLoad]") -> "GeneratorLoad":
        lags = tuple(lag for load in loads for lag in load.loop_lags_s)
        return GeneratorLoad(sum(load.cpu_s for load in loads), sum(load.wall_s for load in loads), lags)


@dataclass(frozen=True)
class Round:
    """One load on one target, from the first request to the last ending."""

    records: tuple[RequestRecord, ...]
    generator: GeneratorLoad

    @property
    def duration_s(self) -> float:
        """The time from the first request sent to the last one ended: the denominator of throughputs."""
        if not self.records:
            return 0.0
        return max(record.ended_s for record in self.records) - min(record.sent_s for record in self.records)
